"""The command experiment: files, errors, and resuming after a signal or a kill."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import pytest
import yaml

from dwp_pyro.runtime.files import locked
from dwp_pyro.study.grid import Study
from tests.commands.test_bad_input import check, snapshot
from tests.world import call

pytestmark = pytest.mark.slow

STUDY = {
    "settings": {"members": 1, "root": "data/brats", "widths": [2, 3, 4, 5], "patch": 24, "validation": 1, "steps": 4},
    "methods": {
        "DWP": {"command": "svi", "prior": "dwp"},
        "UNet-RI": {"command": "finetune", "init": "random", "learning-rate": 0.004},
        "UNet-PR": {"command": "finetune", "init": "source"},
        "around source": {"command": "svi", "prior": "normal", "center": "source"},
    },
    "runs": [
        {"methods": ["DWP", "UNet-RI"], "n": [2], "seeds": [0, 1]},
        {"methods": ["UNet-PR", "around source"], "n": [3], "seeds": [0]},
    ],
    "samples": 2,
}
KEYS = [(method, "2", seed) for seed in "01" for method in ("DWP", "UNet-RI")]
KEYS += [("UNet-PR", "3", "0"), ("around source", "3", "0")]


def write(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


def without_seconds(out: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(out)]


def runs_of(out: Path) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row["method"], row["n"], row["seed"]) for row in rows_of(out)))


def runs_reported(printed: str) -> list[str]:
    return re.findall(r"^(.*, seed \d): Dice", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> tuple[Path, str]:
    """Run the study; return its folder, which tests must not change, and the output."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.path)
        result = call("experiment", write(folder), "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out", result.stdout


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


def test_what_is_written_and_printed(finished):
    out, printed = finished
    assert runs_of(out) == KEYS
    assert runs_reported(printed) == [f"{method}, n {n}, seed {seed}" for method, n, seed in KEYS]
    table = (out / "table.md").read_text()
    assert table.count("\n| 2 | ") == 3 and table.count("\n| 3 | ") == 3
    assert "UNet-RI − DWP" in printed or "DWP − UNet-RI" in printed
    assert "these patients only" in printed and "these patients only" in table
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for method in ("DWP", "UNet-RI"):
        assert {row["case"] for row in rows_of(out) if (row["method"], row["seed"]) == (method, "0")} == set(
            json.loads((out / "runs/DWP-n2-seed0/split.json").read_text())["test"]
        )
    assert all(float(row["seconds"]) > 0 for row in rows_of(out))


def test_the_metrics_equal_those_of_evaluate(command, in_world, copied):
    run = copied / "runs/DWP-n2-seed1"
    assert command("evaluate", run, "--samples", 2, "--seed", 1).exit_code == 0
    measured = {row["case"]: row for row in rows_of(copied) if (row["method"], row["seed"]) == ("DWP", "1")}
    with open(run / "evaluation.csv") as file:
        evaluated = list(csv.DictReader(file))
    assert [row["case"] for row in evaluated] == list(measured)
    for row in evaluated:
        assert measured[row["case"]]["patient"] == row["patient"]
        for name in set(row) - {"case", "patient", "region"}:
            assert float(measured[row["case"]][name]) == pytest.approx(float(row[name]), rel=1e-6), name


def test_a_run_records_the_files_that_its_training_read(in_world, finished):
    out, _ = finished
    for study_run in Study.read(out.parent / "study.yaml").runs:
        read = json.loads((out / "runs" / study_run.name / "learned_from.json").read_text())
        assert list(read) == ["scans", *(path.name for path in study_run.config.learned_from())], study_run


def test_finished_runs_are_not_run_again_and_others_are_kept(command, in_world, copied, tmp_path):
    before = snapshot(copied / "runs")
    fewer = write(tmp_path, runs=[{"methods": ["UNet-RI"], "n": [2], "seeds": [0]}])
    result = command("experiment", fewer, "--out", copied)
    assert result.exit_code == 0 and runs_reported(result.stdout) == []
    assert snapshot(copied / "runs") == before
    assert sorted(runs_of(copied)) == sorted(KEYS)
    assert "UNet-RI" in (copied / "table.md").read_text() and "DWP" not in (copied / "table.md").read_text()


def test_a_table_without_newer_metrics_is_extended(command, in_world, copied, tmp_path):
    """Metrics that old rows lack are empty in the file and dashes in the table; no run is repeated."""
    old = ["method", "n", "seed", "case", "dice", "iou", "hd95", "nll", "ece", "seconds", "settings"]
    before = rows_of(copied)
    lines = [",".join(old), *(",".join(row[name] for name in old) for row in before)]
    (copied / "results.csv").write_text("\n".join(lines) + "\n")
    result = command("experiment", write(tmp_path), "--out", copied)
    assert result.exit_code == 0 and runs_reported(result.stdout) == []
    after = rows_of(copied)
    assert [{name: row[name] for name in old} for row in after] == [{name: row[name] for name in old} for row in before]
    assert {row["nsd"] for row in after} == {""} and "" not in {row["nsd"] for row in before}
    assert " | - | " in (copied / "table.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 3},
        {"evaluate": "validation"},
        {"settings": STUDY["settings"] | {"steps": 5}},
        {"settings": STUDY["settings"] | {"validation": 2}},
    ],
)
@pytest.mark.parametrize("recorded", ["in the table", "beside the run"])
def test_other_settings_are_refused(command, in_world, copied, tmp_path, changes, recorded):
    if recorded == "beside the run":
        header = (copied / "results.csv").read_text().splitlines()[0]
        (copied / "results.csv").write_text(header + "\n")
    study = write(tmp_path, **changes)
    before = snapshot(copied)
    check(command("experiment", study, "--out", copied), before, copied, "DWP, n 2, seed 0 was run with other settings")


def test_a_changed_label_is_refused(command, copy_of_world, copied, tmp_path):
    for label in (copy_of_world / "data/brats").rglob("*_seg.nii*"):
        scan = nibabel.load(label)
        nibabel.save(nibabel.Nifti1Image(scan.get_fdata()[::-1].astype("uint8"), scan.affine), label)
    before = snapshot(copied)
    study = write(tmp_path)
    check(command("experiment", study, "--out", copied), before, copied, "was run with other settings, scans or priors")


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"runs": [{"methods": ["PR"], "n": [2], "seeds": [0]}]}, "study.yaml: runs: 'PR' is not one of the methods"),
        ({"settings": {"stepz": 4}}, "study.yaml: settings: 'stepz'"),
        ({"settings": STUDY["settings"] | {"root": "nowhere"}}, "study.yaml: DWP, n 2, seed 0: nowhere"),
        ({"settings": STUDY["settings"] | {"prior-dir": "nowhere"}}, "nowhere/prior.safetensors: no such file"),
        ({"settings": STUDY["settings"] | {"split": "no.json"}}, "no.json"),
        ({"settings": STUDY["settings"] | {"modality": ["pet"]}}, "has no pet scan"),
        ({"settings": STUDY["settings"] | {"validation": 0}, "evaluate": "validation"}, "has no validation cases"),
        ({"runs": [{"methods": ["UNet-RI"], "n": [2, 50], "seeds": [0]}]}, "UNet-RI, n 50, seed 0: 50 training"),
    ],
)
def test_an_invalid_study_is_refused_before_the_first_run(command, in_world, tmp_path, changes, culprit):
    study = write(tmp_path, **changes)
    before = snapshot(tmp_path)
    check(command("experiment", study, "--out", tmp_path / "out"), before, tmp_path, culprit)
    assert not (tmp_path / "out").exists()


def test_an_invalid_folder_is_refused(command, in_world, copied, tmp_path):
    study = write(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.csv").write_text("a,b\n1,2\n")
    before = snapshot(tmp_path)
    for out, culprit in {"thesis": "holds files", "study.yaml": "is a file"}.items():
        check(command("experiment", study, "--out", tmp_path / out), before, tmp_path, culprit)
    with locked(copied):
        check(command("experiment", study, "--out", copied), before, tmp_path, "another process")
    result = command("experiment", study, "--out", tmp_path / "damaged")
    assert result.exit_code == 2 and "results.csv: is not a table of this version" in result.stderr


def test_validation_cases_and_a_run_that_fails(command, in_world, tmp_path):
    """The second method has another architecture than the source network; the first run is kept."""
    methods = {"UNet-RI": STUDY["methods"]["UNet-RI"], "wide": STUDY["methods"]["UNet-PR"] | {"widths": [2, 2, 2, 2]}}
    runs = [{"methods": ["UNet-RI", "wide"], "n": [2], "seeds": [0]}]
    result = command(
        "experiment", write(tmp_path, methods=methods, runs=runs, evaluate="validation"), "--out", tmp_path / "out"
    )
    assert result.exit_code == 2 and "Error: wide, n 2, seed 0: " in result.stderr
    assert "the source network has widths" in result.stderr and "Traceback" not in result.output
    split = json.loads((tmp_path / "out/runs/UNet-RI-n2-seed0/split.json").read_text())
    assert [row["case"] for row in rows_of(tmp_path / "out")] == split["validation"]
    assert (tmp_path / "out/table.md").exists()


def start(study: Path, out: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "dwp_pyro", "experiment", str(study), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_called_again_with_more_workers(command, in_world, finished, tmp_path):
    """Finished runs are kept, and the table equals that of an uninterrupted study."""
    study, out = write(tmp_path), tmp_path / "out"
    process = start(study, out)
    wait_for(lambda: (out / "results.csv").exists() and len(rows_of(out)) > 0)
    process.kill()
    process.communicate()
    done = runs_of(out)
    assert 0 < len(done) < len(KEYS)
    runs = [out / f"runs/{method}-n{n}-seed{seed}" for method, n, seed in done]
    before = [snapshot(run) for run in runs]
    result = command("experiment", study, "--out", out, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert [snapshot(run) for run in runs] == before
    assert len(runs_reported(result.stdout)) == len(KEYS) - len(done)
    assert without_seconds(out) == without_seconds(finished[0])


def test_a_signal_leaves_checkpoints(in_world, tmp_path):
    runs = [{"methods": ["DWP", "UNet-RI"], "n": [2], "seeds": [0]}]
    study = write(tmp_path, runs=runs, settings=STUDY["settings"] | {"steps": 5000})
    run = tmp_path / "out/runs/DWP-n2-seed0"
    process = start(study, tmp_path / "out")
    wait_for(lambda: (run / "metrics.jsonl").exists() and bool((run / "metrics.jsonl").read_text()))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "Error: stopped by SIGTERM; run the same command again to resume"
    assert list(run.glob("checkpoint-*.safetensors"))
    with locked(run):  # its worker has ended
        assert json.loads(run.with_name("DWP-n2-seed0.json").read_text())["seconds"] > 0
