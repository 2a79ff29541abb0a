"""Killed and resumed commands give bit-identical results."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import locked
from tests.robustness.trial import TrialResult, run
from tests.world import SVI_RUN, TINY, World

pytestmark = pytest.mark.slow

STUDY = {
    "settings": {"members": 1, "root": "data/brats", "widths": [2, 3, 4, 5], "patch": 16, "validation": 1, "steps": 2},
    "methods": {"DWP": {"command": "svi", "prior": "dwp"}, "UNet-PR": {"command": "finetune", "init": "source"}},
    "runs": [{"methods": ["DWP", "UNet-PR"], "n": [2], "seeds": [0]}],
    "samples": 2,
}
COMMANDS = {
    "fit-prior": ("fit-prior", *TINY, "--bootstraps", 2, "--snapshots", 1, "--density-steps", 10),
    "svi": ("svi", "--n", 2, *TINY, "--members", 2),
    "finetune": ("finetune", "--n", 2, "--init", "source", *TINY),
    "predict": ("predict", SVI_RUN, "data/two", "--samples", 2),
    "experiment": ("experiment", "study.yaml"),
}

KILLS = 3  # per command; the study test uses 20


@dataclass(frozen=True)
class Reference:
    """Command and its results when it is not interrupted.

    Args:
        arguments: Arguments of dwp-pyro, without the output folder.
        folder: Working folder.
        trial: Uninterrupted trial.
        expected: Results of the uninterrupted trial.
    """

    arguments: tuple[object, ...]
    folder: Path
    trial: TrialResult
    expected: dict[str, object]

    def call(self, out: Path, *options: object, **trial_options: Any) -> TrialResult:
        """Call the command, and resume if it has been interrupted; `trial_options` are those of `run`."""
        name = self.arguments[0]
        while is_locked(out):  # workers notice the death of their parent with a delay
            time.sleep(0.1)
        resume = ["--resume"] if name == "predict" or (out / "run.json").exists() else []
        return run([*self.arguments, *options, "--out", out, *resume], self.folder, out, **trial_options)


def make_reference(name: str, world: World, folder: Path) -> Reference:
    (world.path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    out = folder / "undisturbed"
    arguments = COMMANDS[name]
    run(["--version"], world.path, out)  # start the fork server before a trial is timed
    trial = run([*arguments, "--out", out], world.path, out)
    assert trial.exit_code == 0, trial.output
    return Reference(arguments, world.path, trial, results(out))


@pytest.fixture(scope="module", params=COMMANDS)
def reference(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, world, tmp_path_factory.mktemp("undisturbed"))


def results(out: Path) -> dict[str, object]:
    """Return the content of all output files without measured times."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if (
            not path.is_file()
            or "tensorboard" in path.parts
            or path.name == "table.md"
            or path.name.startswith(".lock")
        ):
            continue  # table.md repeats results.csv, with seconds
        if name == "results.csv":
            rows = csv.DictReader(io.StringIO(path.read_text()))
            found[name] = [{column: value for column, value in row.items() if column != "seconds"} for row in rows]
        elif path.parent.name == "runs":
            found[name] = json.loads(path.read_text())["settings"]
        else:
            found[name] = path.read_bytes()
    return found


def is_finished(out: Path) -> bool:
    state = out / "run.json"
    return state.exists() and json.loads(state.read_text())["finished"]


def is_locked(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder):
            return False
    except RunError:
        return True


def kill_and_resume(reference: Reference, kill_points: Iterator[dict[str, Any]], kills: int, folder: Path) -> None:
    """Kill the command `kills` times, resume it after each kill, and check the results of every finished run."""
    killed = 0
    for number in itertools.count():
        out = folder / f"out{number}"
        while not is_finished(out):
            trial = reference.call(out, **(next(kill_points) if killed < kills else {}))
            if trial.exit_code == 0:
                break
            # If a worker is killed, the study reports it and exits.
            assert trial.exit_code == -signal.SIGKILL or "a worker process was killed" in trial.output, trial.output
            killed += 1
        check_results(reference, out)
        if killed == kills:
            return


def check_results(reference: Reference, out: Path) -> None:
    found = results(out)
    assert found.keys() == reference.expected.keys()
    for name, content in reference.expected.items():
        assert found[name] == content, name


def random_kill_points(reference: Reference) -> Iterator[dict[str, Any]]:
    """Yield options of `run`: in turn a random time and a random file change."""
    source = random.Random(0)
    while True:
        yield {"after": source.uniform(0, reference.trial.seconds)}
        yield {"before_change": source.randint(1, reference.trial.changes)}


def test_killed_at_random_points(reference, tmp_path):
    kill_and_resume(reference, random_kill_points(reference), KILLS, tmp_path)


@pytest.mark.study
def test_killed_at_twenty_random_points(reference, tmp_path):
    kill_and_resume(reference, random_kill_points(reference), 20, tmp_path)


@pytest.mark.study
def test_killed_before_each_file_change(reference, tmp_path):
    for change in range(1, reference.trial.changes + 1):
        folder = tmp_path / str(change)
        folder.mkdir()
        kill_and_resume(reference, iter([{"before_change": change}]), 1, folder)
        shutil.rmtree(folder)
