"""Studies without their trainings."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.metrics import MEASURES
from dwp_pyro.runtime.errors import RunOutdated
from dwp_pyro.runtime.files import write_json
from dwp_pyro.runtime.workers import Workers
from dwp_pyro.study import runner
from dwp_pyro.study.comparison import Row
from dwp_pyro.study.grid import Study

TRAIN_AND_MEASURE = runner._run
DICE = {"a": 0.4, "b": 0.6}
VISITS = {"v1": 0.0, "v2": 0.1, "v3": 0.3}  # v1 and v2 of one patient


def measured(task: runner._Task) -> list[Row]:
    method, n, seed = task.study_run.key
    measures = dict.fromkeys(MEASURES, 0.0)
    patients = task.data.patients
    return [
        Row(method, n, seed, case, measures | {"dice": DICE[method] + more}, 1.0, task.settings, patients[case])
        for case, more in VISITS.items()
    ]


def in_this_process(workers: Workers, work, tasks, finished) -> None:
    for task in tasks:
        finished(task, work(task))


@pytest.fixture
def study_of(tmp_path, monkeypatch):
    """Return a function that writes a study of some methods on nine scans, three of them for the test."""
    write_phantoms("brats", tmp_path / "data", 7, shape=(16, 18, 16), spacing=8.0)
    scans = sorted((tmp_path / "data").rglob("*_flair.nii.gz"))
    names = ["t1", "t2", "t3", "w", *VISITS]
    patients = {"v1": "p", "v2": "p"}
    rows = [
        f"{name},{patients.get(name, name)},{scan},{str(scan).replace('_flair', '_seg')}"
        for name, scan in zip(names, scans, strict=True)
    ]
    (tmp_path / "scans.csv").write_text("\n".join(["id,patient,flair,label", *rows]) + "\n")
    split = {"train": ["t1", "t2"], "validation": ["t3", "w"], "test": list(VISITS)}
    (tmp_path / "split.json").write_text(json.dumps(split))

    monkeypatch.setattr(runner, "_run", measured)
    monkeypatch.setattr(Workers, "map", in_this_process)

    def write(*methods: str) -> Study:
        settings = {
            "root": str(tmp_path / "scans.csv"), "split": str(tmp_path / "split.json"), "widths": [2, 3, 4, 5],
            "spacing": 8.0, "region": ["whole"], "label-map": ["1=necrosis", "2=oedema", "4=enhancing"],
        }  # fmt: skip
        listed = {
            "settings": settings,
            "methods": {name: {"command": "finetune", "init": "random"} for name in methods},
            "runs": [{"methods": list(methods), "n": [2], "seeds": [0]}],
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(listed))
        return Study.read(tmp_path / "study.yaml")

    return write


def test_patients_are_the_unit(study_of, tmp_path):
    """Means over p and v3: .05 and .3 above the Dice of the method."""
    runner.experiment(study_of("a"), tmp_path / "out")
    means, differences = runner.experiment(study_of("a", "b"), tmp_path / "out")
    assert [line[1:4] for line in means.rows] == [["b", "1", "0.775"], ["a", "1", "0.575"]]
    assert differences.rows[0][3] == "+0.200 [+0.200, +0.200]"
    assert [row.patient for row in runner.read_rows(tmp_path / "out" / "results.csv")] == ["p", "p", "v3"] * 2


def test_a_run_on_another_split_is_not_measured(study_of, tmp_path, monkeypatch):
    """Training looks for the scans again; with one that was added meanwhile it could have seen those to be measured."""
    study = study_of("a")
    (tmp_path / "runs").mkdir()
    task = runner._task(study, study.runs[0], tmp_path, "cpu", lambda path: "")

    def train(train, path, device):
        path.mkdir()
        write_json(path / "split.json", {"train": ["v1", "t1"], "validation": ["t3", "w"], "test": ["v2", "v3"]})

    monkeypatch.setattr(runner, "run_if_unfinished", train)
    with pytest.raises(RunOutdated, match=r"scans were added or removed .* delete it"):
        TRAIN_AND_MEASURE(task)


def test_changed_unlabelled_scans_are_another_study(study_of, tmp_path):
    study_of("a")
    write_phantoms("brats", tmp_path / "more", 1, shape=(16, 18, 16), spacing=8.0)
    path = tmp_path / "study.yaml"
    listed = yaml.safe_load(path.read_text())
    listed["settings"]["unlabelled"] = str(tmp_path / "more")
    path.write_text(yaml.safe_dump(listed))
    study = Study.read(path)
    runner.experiment(study, tmp_path / "out")
    shutil.rmtree(tmp_path / "more")
    write_phantoms("brats", tmp_path / "more", 1, seed=1, shape=(16, 18, 16), spacing=8.0)
    with pytest.raises(runner.FolderTaken, match="was run with other settings, scans or priors"):
        runner.experiment(study, tmp_path / "out")
