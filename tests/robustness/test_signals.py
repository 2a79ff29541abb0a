"""SIGTERM and SIGINT, wherever a command is: a checkpoint, one line that says how to go on, the conventional code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import pytest

from tests.robustness.test_kill import COMMANDS, Scene, check, scene_of
from tests.robustness.trial import Ended, run

pytestmark = pytest.mark.slow

PROMPT = 1.0  # seconds: a step of these takes a tenth, the pictures of a study's table half
DEAF = 30.0  # seconds that what is interrupted would go on for


@dataclass(frozen=True)
class Moment:
    """Where a signal comes: at the n-th call of a function.

    Args:
        command: of `COMMANDS`.
        function: "module:name".
        number: of the call, from 1.
        says: the end of the line.
        heeded: at once, while the function runs; else after it, as in a step of the optimiser.
        begun: whether there is a run to go on with.
    """

    command: str
    function: str
    number: int
    says: str
    heeded: bool = True
    begun: bool = True


RESUME, SAVED, AGAIN = (
    "; resume with --resume",
    ", checkpoint saved; resume with --resume",
    "; run the same command again to resume",
)
STEP = "pyro.infer.svi:SVI.step"
VALIDATION = "dwp_pyro.training.network_training:posterior_mean_probability"
READING = "dwp_pyro.training.training_data:read_case"
MOMENTS = {
    "svi, reading scans": Moment("svi", READING, 2, AGAIN, begun=False),
    "svi, in the first step": Moment("svi", STEP, 1, SAVED, heeded=False),
    "svi, in a step of the second member": Moment("svi", STEP, 3, SAVED, heeded=False),
    "svi, validating": Moment("svi", VALIDATION, 2, SAVED),
    "svi, validating after the last step": Moment("svi", VALIDATION, 4, SAVED),
    "svi, writing a checkpoint": Moment("svi", "dwp_pyro.inference.checkpoint:save_tensors", 2, SAVED, heeded=False),
    "svi, writing the posterior": Moment("svi", "dwp_pyro.inference.posterior:save_tensors", 1, RESUME),
    "finetune, in a step": Moment("finetune", STEP, 2, SAVED, heeded=False),
    "fit-prior, in a step": Moment("fit-prior", STEP, 2, SAVED, heeded=False),
    "fit-prior, measuring a snapshot": Moment(
        "fit-prior", "dwp_pyro.training.source_networks:validation_dice", 1, SAVED
    ),
    "fit-prior, fitting a VAE": Moment("fit-prior", "dwp_pyro.densities.vae:KernelVAE.loss", 30, RESUME),
    "predict, checking scans": Moment("predict", "dwp_pyro.prediction.predict:read_case", 1, AGAIN),
    "predict, between cases": Moment("predict", "dwp_pyro.prediction.predict:predict_case", 2, RESUME),
    "predict, in a window": Moment("predict", "dwp_pyro.models.unet:ResidualUNet3d.forward", 3, RESUME),
    "predict, writing a map": Moment("predict", "nibabel:save", 3, RESUME),
    "predict, drawing a case": Moment("predict", "dwp_pyro.prediction.predict:save_case_figure", 1, RESUME),
    "experiment, checking runs": Moment("experiment", "dwp_pyro.study.runner:_task", 2, AGAIN, begun=False),
    "experiment, a worker reads scans": Moment("experiment", READING, 2, AGAIN),
    "experiment, a worker in a step": Moment("experiment", STEP, 1, AGAIN, heeded=False),
    "experiment, a worker validates": Moment("experiment", VALIDATION, 1, AGAIN),
    "experiment, a worker predicts": Moment("experiment", "dwp_pyro.evaluation.evaluate:predict_case", 1, AGAIN),
}


def signal_at(moment: Moment, signum: int) -> None:
    """In the process of a trial: send it the signal when the moment comes, once."""
    where, _, name = moment.function.partition(":")
    parent, _, attribute = name.rpartition(".")
    owner = resolve_name(f"{where}:{parent}" if parent else where)
    function = getattr(owner, attribute)
    study, calls = os.getpid(), 0

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.number:
            print(f"signalled: {time.monotonic()}", file=sys.stderr, flush=True)
            os.kill(study, signum)
            if moment.heeded:
                time.sleep(DEAF)
        return function(*args, **kwargs)

    setattr(owner, attribute, signalled)


def line_of(ended: Ended, signum: int) -> str:
    """The one line that a stop is told by."""
    assert ended.code == 128 + signum, ended.said
    assert "Traceback" not in ended.said and "Exception ignored" not in ended.said, ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
    return line


def is_over(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def scene(world, tmp_path_factory) -> Callable[[str], Scene]:
    """Of a command; made once."""
    made: dict[str, Scene] = {}

    def of(name: str) -> Scene:
        if name not in made:
            made[name] = scene_of(name, world, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def spread(names: Iterable[str]) -> list[Any]:
    """Every third by default, the rest by `pytest -m study`."""
    return [
        name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.study) for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", spread(MOMENTS))
def test_a_signal_stops_at_once_and_the_command_goes_on_to_the_same_bits(scene, tmp_path, name):
    moment, signum = MOMENTS[name], (signal.SIGTERM, signal.SIGINT)[list(MOMENTS).index(name) % 2]
    command, out = scene(moment.command), tmp_path / "out"
    ended = command.call(out, prepare=signal_at, given=(moment, signum))
    line = line_of(ended, signum)
    assert line.startswith(f"Error: stopped by {signum.name}") and line.endswith(moment.says), line
    came = re.search(r"^signalled: (.+)$", ended.said, re.MULTILINE)
    assert came and ended.at - float(came[1]) < PROMPT, ended.at - float(came[1])
    assert is_over(ended.pid)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert moment.begun or not out.exists()
    again = command.call(out)
    assert again.code == 0, again.said
    check(command, out)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_study_stops_with_all_its_workers(scene, tmp_path, signum):
    command, out = scene("experiment"), tmp_path / "out"
    moment = MOMENTS["experiment, a worker in a step"]
    ended = command.call(out, "--workers", 2, prepare=signal_at, given=(moment, signum))
    assert (
        line_of(ended, signum)
        == f"Error: stopped by {signum.name}, checkpoint saved; run the same command again to resume"
    )
    assert is_over(ended.pid)
    # The study checks for the signal twice a second; until then the few steps of a run may be finished.
    assert [*out.glob("runs/*/checkpoint-*.safetensors"), *out.glob("runs/*/posterior.safetensors")]
    assert command.call(out, "--workers", 2).code == 0
    check(command, out)


def test_an_evaluation_stops_and_goes_on(world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(world.path / "runs/svi-brats-dwp-n2-seed0", out)
    arguments = ("evaluate", out, "--samples", 1)
    moment = Moment("evaluate", "dwp_pyro.evaluation.evaluate:case_metrics", 1, AGAIN)
    ended = run(arguments, world.path, out, prepare=signal_at, given=(moment, signal.SIGTERM))
    assert line_of(ended, signal.SIGTERM) == "Error: stopped by SIGTERM; run the same command again to resume"
    kept = {path: path.stat().st_mtime_ns for path in (out / "predictions").glob("*.nii.gz")}
    assert kept and run(arguments, world.path, out).code == 0
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in (out / "predictions").glob("*.nii.gz")}.items()
    assert (out / "evaluation.json").exists() and not list(out.rglob(".tmp-*"))


def test_a_real_process_stops_within_a_step(world, tmp_path):
    """As a terminal does it: to the whole group. (A study by SIGTERM is in tests/commands/test_experiment.py.)"""
    out = tmp_path / "run"
    call = ("-c", "from dwp_pyro.cli import main; main()", *COMMANDS["svi"], "--steps", 100_000, "--out", out)
    line = [sys.executable, *map(str, call)]
    process = subprocess.Popen(line, cwd=world.path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5  # a step, a checkpoint, and the end of Python
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Error: stopped by SIGINT, checkpoint saved; resume with --resume"
    assert list(out.glob("checkpoint-*.safetensors"))
    assert not json.loads((out / "run.json").read_text())["finished"]
