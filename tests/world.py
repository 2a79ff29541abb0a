"""Scans, a prior, an svi run and a finetune run, made once by the commands; fixtures that tests/conftest.py shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dwp_pyro.cli import main
from dwp_pyro.data.phantom import write_phantoms

#: Options for a small network and a short training.
TINY = ("--widths", "2,3,4,5", "--patch", "24", "--validation", "1", "--steps", "4")

#: The svi run of the world.
SVI_RUN = "runs/svi-brats-dwp-n2-seed0"


@dataclass(frozen=True)
class World:
    """Folder with data/ms, data/brats and runs/, and the output of the commands that made runs/."""

    path: Path
    outputs: dict[str, str]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(output: str) -> str:
    """Return the error line of a command's output, which must have exactly one and no traceback."""
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    return line


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Make the world; tests must not change it, see `copy_of_world`."""
    path = tmp_path_factory.mktemp("world")
    shape = (28, 32, 28)
    write_phantoms("ms", path / "data" / "ms", 6, shape=shape)
    write_phantoms("brats", path / "data" / "brats", 9, shape=shape)
    write_phantoms("brats", path / "data" / "two", 2, shape=shape)
    outputs = {}
    previous = Path.cwd()
    os.chdir(path)
    try:
        for name, command in {
            "fit-prior": ("fit-prior", *TINY, "--bootstraps", "2", "--density-steps", "20"),
            "svi": ("svi", "--dataset", "brats", "--prior", "dwp", "--n", "2", *TINY, "--members", "2"),
            "finetune": ("finetune", "--n", "2", "--init", "source", *TINY),
        }.items():
            result = call(*command)
            assert result.exit_code == 0, result.output
            outputs[name] = result.output
    finally:
        os.chdir(previous)
    return World(path, outputs)


@pytest.fixture
def in_world(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder of the world; tests must not change it."""
    monkeypatch.chdir(world.path)
    monkeypatch.delenv("DWP_PYRO_DATA", raising=False)
    return world.path


@pytest.fixture
def copy_of_world(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a copy of the world that tests may change."""
    copy = tmp_path / "world"
    shutil.copytree(world.path, copy)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("DWP_PYRO_DATA", raising=False)
    return copy


@pytest.fixture
def command() -> Callable[..., Result]:
    return call
