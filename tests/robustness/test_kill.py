"""A command that is killed, again and again, ends in the bits of one that was not."""

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
from tests.commands.conftest import TINY, World
from tests.robustness.trial import Ended, run

pytestmark = pytest.mark.slow

STUDY = {
    "settings": {
        "members": 1,
        "root": "data/brats",
        "widths": [2, 3, 4, 5],
        "patch": 16,
        "validation": 1,
        "steps": 2,
    },
    "methods": {"DWP": {"command": "svi", "prior": "dwp"}, "UNet-PR": {"command": "finetune", "init": "source"}},
    "runs": [{"methods": ["DWP", "UNet-PR"], "n": [2], "seeds": [0]}],
    "samples": 2,
}
COMMANDS = {
    "fit-prior": ("fit-prior", *TINY, "--bootstraps", 2, "--snapshots", 1, "--density-steps", 10),
    "svi": ("svi", "--n", 2, *TINY, "--members", 2),
    "finetune": ("finetune", "--n", 2, "--init", "source", *TINY),
    "predict": ("predict", "runs/svi-brats-dwp-n2-seed0", "data/two", "--samples", 2),
    "experiment": ("experiment", "study.yaml"),
}


KILLS = 3  # of each command; all twenty by `pytest -m study`


@dataclass(frozen=True)
class Scene:
    """A command, the folder where it is called, and what it makes when nothing disturbs it."""

    arguments: tuple[object, ...]
    folder: Path
    undisturbed: Ended
    expected: dict[str, object]

    def call(self, out: Path, *more: object, **how: Any) -> Ended:
        """Begin, or go on; see `run` for how."""
        name = self.arguments[0]
        while is_held(out):  # by a worker that has not yet noticed that its parent was killed
            time.sleep(0.1)
        resume = ["--resume"] if name == "predict" or (out / "run.json").exists() else []
        return run([*self.arguments, *more, "--out", out, *resume], self.folder, out, **how)


def scene_of(name: str, world: World, folder: Path) -> Scene:
    (world.path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    out = folder / "undisturbed"
    arguments = COMMANDS[name]
    run(["--version"], world.path, out)  # the first trial waits for the server, and the others are timed
    ended = run([*arguments, "--out", out], world.path, out)
    assert ended.code == 0, ended.said
    return Scene(arguments, world.path, ended, results(out))


@pytest.fixture(scope="module", params=COMMANDS)
def scene(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of(request.param, world, tmp_path_factory.mktemp("undisturbed"))


def results(out: Path) -> dict[str, object]:
    """All that a command left, without what tells the time; the lock files are empty."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or "tensorboard" in path.parts or path.name in (".lock", "table.md"):
            continue  # the table follows from results.csv, and tells the seconds
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


def is_held(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder):
            return False
    except RunError:
        return True


def go_through(scene: Scene, kills: Iterator[dict[str, Any]], wanted: int, folder: Path) -> None:
    """Let so many kills hit, each run going on after each; compare every run that comes to its end."""
    killed = 0
    for number in itertools.count():
        out = folder / f"out{number}"
        while not is_finished(out):
            ended = scene.call(out, **(next(kills) if killed < wanted else {}))
            if ended.code == 0:
                break
            # A worker that is killed is told of by the study.
            assert ended.code == -signal.SIGKILL or "a worker process was killed" in ended.said, ended.said
            killed += 1
        check(scene, out)
        if killed == wanted:
            return


def check(scene: Scene, out: Path) -> None:
    found = results(out)
    assert found.keys() == scene.expected.keys()
    for name, content in scene.expected.items():
        assert found[name] == content, name


def moments(scene: Scene) -> Iterator[dict[str, Any]]:
    """Half of them at a time of the clock, half ahead of a change of the run's files, wherever in the command."""
    source = random.Random(0)
    while True:
        yield {"after": source.uniform(0, scene.undisturbed.seconds)}
        yield {"before_change": source.randint(1, scene.undisturbed.changes)}


def test_killed_at_random_moments(scene, tmp_path):
    go_through(scene, moments(scene), KILLS, tmp_path)


@pytest.mark.study
def test_killed_at_twenty_random_moments(scene, tmp_path):
    go_through(scene, moments(scene), 20, tmp_path)


@pytest.mark.study
def test_killed_ahead_of_each_change_of_a_file(scene, tmp_path):
    for change in range(1, scene.undisturbed.changes + 1):
        folder = tmp_path / str(change)
        folder.mkdir()
        go_through(scene, iter([{"before_change": change}]), 1, folder)
        shutil.rmtree(folder)
