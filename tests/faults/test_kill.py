"""A command that is killed, again and again, ends in the bits of one that was not."""

from __future__ import annotations

import csv
import io
import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import yaml

from dwp_pyro.errors import RunError
from dwp_pyro.storage import locked
from tests.cli.conftest import TINY, World
from tests.faults.trial import Ended, run

STUDY = {
    "settings": {
        "members": 1,
        "root": "data/brats",
        "widths": [2, 3, 4, 5],
        "short": True,
        "patch": 16,
        "validation": 1,
        "steps": 2,
    },
    "arms": {"DWP": {"command": "svi", "prior": "dwp"}, "UNet-PR": {"command": "finetune", "init": "source"}},
    "cells": [{"arms": ["DWP", "UNet-PR"], "n": [2], "seeds": [0]}],
    "samples": 2,
}
COMMANDS = {
    "fit-prior": ("fit-prior", *TINY, "--bootstraps", 2, "--snapshots", 1, "--vae-steps", 10),
    "svi": ("svi", "--n", 2, *TINY, "--members", 2),
    "finetune": ("finetune", "--n", 2, "--init", "source", *TINY),
    "predict": ("predict", "runs/svi-brats-dwp-n2-seed0", "three.csv", "--samples", 2),
    "experiment": ("experiment", "study.yaml"),
}
KILLS = 3  # of each command; all twenty by `pytest -m study`
MOMENTS = 1
LONGEST_STOP = 5.0  # seconds, on a machine that does other work: a step and a checkpoint take a tenth of one


@dataclass(frozen=True)
class Kill:
    """When to stop a process: after seconds, by a signal, or before a change of a file, by SIGKILL."""

    after: float | None = None
    signum: int = signal.SIGKILL
    before_change: int | None = None


@dataclass(frozen=True)
class Scene:
    """A command, the folder where it is called, and what it makes when nothing disturbs it."""

    arguments: tuple[object, ...]
    folder: Path
    undisturbed: Ended
    expected: dict[str, object]

    def call(self, out: Path, kill: Kill = Kill()) -> Ended:
        """Begin, or go on."""
        name = self.arguments[0]
        while _is_held(out):  # by a worker that has not yet noticed that its parent was killed
            time.sleep(0.1)
        begun = (out / "run.json").exists() if name != "predict" else True
        resume = ["--resume"] if begun and name != "experiment" else []
        return run(
            [*self.arguments, "--out", out, *resume],
            self.folder,
            out,
            after=kill.after,
            signum=kill.signum,
            before_change=kill.before_change,
        )


def prepare(folder: Path) -> None:
    """Put the study, and a list of three cases, into a world."""
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    scans = sorted(folder.glob("data/brats/HGG/*/*_flair.nii.gz"))[:3]
    (folder / "three.csv").write_text("\n".join(["id,flair", *(f"case{i},{scan}" for i, scan in enumerate(scans))]))


def _is_held(folder: Path) -> bool:
    try:
        with locked(folder):
            return False
    except RunError:
        return True


@pytest.fixture(scope="module", params=COMMANDS)
def scene(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    prepare(world.path)
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    arguments = COMMANDS[request.param]
    run(["--help"], world.path, out)  # the first starts the server: it would tell nothing of how long a run takes
    ended = run([*arguments, "--out", out], world.path, out)
    assert ended.code == 0, ended.said
    return Scene(arguments, world.path, ended, results(out))


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
        elif path.parent.name == "cells":
            found[name] = json.loads(path.read_text())["settings"]
        else:
            found[name] = path.read_bytes()
    return found


def is_finished(scene: Scene, out: Path) -> bool:
    state = out / "run.json"
    return state.exists() and json.loads(state.read_text())["finished"]


def go_through(scene: Scene, kills: Iterator[Kill], folder: Path) -> int:
    """Kill runs until there are no kills left, and compare each that comes to its end; return how many were killed."""
    killed = 0
    for number in range(1000):
        out = folder / f"out{number}"
        for kill in kills:
            ended = scene.call(out, kill)
            if ended.code == 0:
                break
            killed += 1
            # A worker that is killed is told of by the study; where nothing is left to do, --resume says so.
            assert ended.code == -9 or "was stopped by SIGKILL" in ended.said, ended.said
            if is_finished(scene, out):
                break
        else:
            ended = scene.call(out)
            assert ended.code == 0, ended.said
            check(scene, out)
            return killed
        check(scene, out)
    raise AssertionError


def check(scene: Scene, out: Path) -> None:
    found = results(out)
    assert found.keys() == scene.expected.keys()
    for name, content in scene.expected.items():
        assert found[name] == content, name


def kill_at_random_moments(scene: Scene, folder: Path, kills: int) -> None:
    """Half of them at a time of the clock, half ahead of a change of the run's files, wherever in the command."""
    moments = random.Random(0)

    def forever() -> Iterator[Kill]:
        while True:
            yield Kill(after=moments.uniform(0, scene.undisturbed.seconds))
            yield Kill(before_change=moments.randint(1, scene.undisturbed.changes))

    killed = 0
    source = forever()
    while killed < kills:
        killed += go_through(scene, islice(source, kills - killed), folder / str(killed))


def test_killed_at_random_moments(scene, tmp_path):
    kill_at_random_moments(scene, tmp_path, KILLS)


@pytest.mark.study
def test_killed_at_twenty_random_moments(scene, tmp_path):
    kill_at_random_moments(scene, tmp_path, 20)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_at_random_moments(scene, tmp_path, signum):
    """It says how to go on, at once, with the code that shells expect, and the command goes on to the same bits."""
    moments = random.Random(int(signum))
    stopped = 0
    for number in range(100):
        out = tmp_path / f"out{number}"
        while True:
            # Earlier, Python is not yet in the command.
            moment = Kill(moments.uniform(0.2, scene.undisturbed.seconds), signum)
            ended = scene.call(out, moment if stopped < MOMENTS else Kill())
            if ended.code == 0:
                break
            stopped += 1
            check_stop(ended, moment, out)
            if is_finished(scene, out):  # the signal came between its last file and its end
                break
        check(scene, out)
        if stopped >= MOMENTS:
            return
    raise AssertionError("it ended ahead of every signal")


def check_stop(ended: Ended, stop: Kill, out: Path) -> None:
    assert ended.code == 128 + stop.signum, ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
    assert f"stopped by {signal.Signals(stop.signum).name}" in line and "go" in line.partition("; ")[2], line
    assert "Traceback" not in ended.said, ended.said
    assert not list(out.rglob(".tmp-*"))
    assert stop.after is not None and ended.seconds - stop.after < LONGEST_STOP


@pytest.mark.study
def test_killed_ahead_of_each_change(scene, tmp_path):
    for change in range(1, scene.undisturbed.changes + 1):
        assert go_through(scene, iter([Kill(before_change=change)]), tmp_path / str(change)) == 1
