"""A command that is killed, again and again, ends in the bits of one that was not."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

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
    "predict": ("predict", "runs/svi-brats-dwp-n2-seed0", "data/brats/HGG", "--samples", 2),
    "experiment": ("experiment", "study.yaml"),
}
KILLS = 20


@dataclass(frozen=True)
class Kill:
    """When to kill: after seconds, or before a change of a file."""

    after: float | None = None
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
        begun = (out / "run.json").exists() if name != "predict" else True
        resume = ["--resume"] if begun and name != "experiment" else []
        return run(
            [*self.arguments, "--out", out, *resume],
            self.folder,
            out,
            after=kill.after,
            before_change=kill.before_change,
        )


@pytest.fixture(scope="module", params=COMMANDS)
def scene(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    (world.path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    arguments = COMMANDS[request.param]
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


def test_killed_at_random_moments(scene, tmp_path):
    """Half of them at a time of the clock, half ahead of a change of the run's files, wherever in the command."""
    moments = random.Random(0)
    half = KILLS // 2
    kills = [Kill(after=moments.uniform(0, scene.undisturbed.seconds)) for _ in range(half)]
    kills += [Kill(before_change=moments.randint(1, scene.undisturbed.changes)) for _ in range(half)]
    moments.shuffle(kills)
    killed = go_through(scene, iter(kills), tmp_path)
    print(scene.undisturbed.seconds, scene.undisturbed.changes, killed)


@pytest.mark.study
def test_killed_ahead_of_each_change(scene, tmp_path):
    for change in range(1, scene.undisturbed.changes + 1):
        assert go_through(scene, iter([Kill(before_change=change)]), tmp_path / str(change)) == 1
