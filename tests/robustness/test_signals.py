"""SIGTERM and SIGINT at any point: a checkpoint, one line that states how to resume, the conventional exit code."""

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

from tests.robustness.test_kill import COMMANDS, Reference, check_results, make_reference
from tests.robustness.trial import TrialResult, run
from tests.world import SVI_RUN, error_line

pytestmark = pytest.mark.slow

MAX_STOP_SECONDS = 5.0  # a step takes 0.1 s, the plots of a study 0.5 s; more on a busy machine
SLEEP_SECONDS = 30.0  # much longer than MAX_STOP_SECONDS, so that only an interrupted sleep passes


@dataclass(frozen=True)
class SignalPoint:
    """Call of a function at which a signal arrives.

    Args:
        command: Key of `COMMANDS`.
        function: Function, as "module:name".
        call: Number of the call, from 1.
        message_end: End of the error line.
        immediate: Whether the signal interrupts the function; otherwise the function finishes first.
        resumable: Whether there is a run to resume; otherwise there is no output folder.
    """

    command: str
    function: str
    call: int
    message_end: str
    immediate: bool = True
    resumable: bool = True


RESUME, SAVED, AGAIN = (
    "; resume with --resume",
    ", checkpoint saved; resume with --resume",
    "; run the same command again to resume",
)
STEP = "pyro.infer.svi:SVI.step"
VALIDATION = "dwp_pyro.training.network_training:posterior_mean_probability"
READING = "dwp_pyro.training.training_data:read_case"
SIGNAL_POINTS = {
    "svi, reading scans": SignalPoint("svi", READING, 2, AGAIN, resumable=False),
    "svi, in the first step": SignalPoint("svi", STEP, 1, SAVED, immediate=False),
    "svi, in a step of the second member": SignalPoint("svi", STEP, 3, SAVED, immediate=False),
    "svi, validating": SignalPoint("svi", VALIDATION, 2, SAVED),
    "svi, validating after the last step": SignalPoint("svi", VALIDATION, 4, SAVED),
    "svi, choosing the decision": SignalPoint(
        "svi", "dwp_pyro.training.choose_decision:posterior_predictive", 1, RESUME
    ),
    "svi, writing a checkpoint": SignalPoint(
        "svi", "dwp_pyro.inference.checkpoint:save_tensors", 2, SAVED, immediate=False
    ),
    "svi, writing the posterior": SignalPoint("svi", "dwp_pyro.inference.posterior:save_tensors", 1, RESUME),
    "finetune, in a step": SignalPoint("finetune", STEP, 2, SAVED, immediate=False),
    "fit-prior, in a step": SignalPoint("fit-prior", STEP, 2, SAVED, immediate=False),
    "fit-prior, measuring a snapshot": SignalPoint(
        "fit-prior", "dwp_pyro.training.source_networks:validation_dice", 1, SAVED
    ),
    "fit-prior, fitting a VAE": SignalPoint("fit-prior", "dwp_pyro.densities.vae:KernelVAE.loss", 30, RESUME),
    "predict, checking scans": SignalPoint("predict", "dwp_pyro.prediction.labels:read_case", 1, AGAIN),
    "predict, between cases": SignalPoint("predict", "dwp_pyro.prediction.predict:predict_case", 2, RESUME),
    "predict, in a window": SignalPoint("predict", "dwp_pyro.models.unet:ResidualUNet3d.forward", 3, RESUME),
    "predict, writing a map": SignalPoint("predict", "nibabel:save", 3, RESUME),
    "predict, plotting a case": SignalPoint("predict", "dwp_pyro.prediction.predict:save_case_figure", 1, RESUME),
    "experiment, checking runs": SignalPoint("experiment", "dwp_pyro.study.runner:_task", 2, AGAIN, resumable=False),
    "experiment, a worker reads scans": SignalPoint("experiment", READING, 2, AGAIN),
    "experiment, a worker in a step": SignalPoint("experiment", STEP, 1, AGAIN, immediate=False),
    "experiment, a worker validates": SignalPoint("experiment", VALIDATION, 1, AGAIN),
    "experiment, a worker predicts": SignalPoint("experiment", "dwp_pyro.evaluation.evaluate:predict_case", 1, AGAIN),
}


def signal_at(point: SignalPoint, signum: int) -> None:
    """Patch a function so that one of its calls sends a signal to this process, which is that of a trial."""
    module, _, name = point.function.partition(":")
    parent, _, attribute = name.rpartition(".")
    owner = resolve_name(f"{module}:{parent}" if parent else module)
    function = getattr(owner, attribute)
    pid, calls = os.getpid(), 0  # a worker signals its parent

    def signaled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == point.call:
            print(f"signaled: {time.monotonic()}", file=sys.stderr, flush=True)
            os.kill(pid, signum)
            if point.immediate:
                time.sleep(SLEEP_SECONDS)
        return function(*args, **kwargs)

    setattr(owner, attribute, signaled)


def stop_message(trial: TrialResult, signum: int) -> str:
    """Return the error line of a trial that a signal has stopped."""
    assert trial.exit_code == 128 + signum, trial.output
    assert "Exception ignored" not in trial.output, trial.output
    return error_line(trial.output)


def has_ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def make_once(world, tmp_path_factory) -> Callable[[str], Reference]:
    """Return a function that makes the reference of a command at its first call."""
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            made[name] = make_reference(name, world, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def every_third(names: Iterable[str]) -> list[Any]:
    """Mark all but every third name as a study."""
    return [
        name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.study) for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", every_third(SIGNAL_POINTS))
def test_a_signal_stops_the_command_and_resuming_gives_identical_results(make_once, tmp_path, name):
    point, signum = SIGNAL_POINTS[name], (signal.SIGTERM, signal.SIGINT)[list(SIGNAL_POINTS).index(name) % 2]
    reference, out = make_once(point.command), tmp_path / "out"
    stopped = reference.call(out, prepare=signal_at, args=(point, signum))
    line = stop_message(stopped, signum)
    assert line.startswith(f"Error: stopped by {signum.name}") and line.endswith(point.message_end), line
    sent = re.search(r"^signaled: (.+)$", stopped.output, re.MULTILINE)
    assert sent and stopped.ended_at - float(sent[1]) < MAX_STOP_SECONDS, stopped.ended_at - float(sent[1])
    assert has_ended(stopped.pid)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert point.resumable or not out.exists()
    resumed = reference.call(out)
    assert resumed.exit_code == 0, resumed.output
    check_results(reference, out)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_study_stops_with_all_its_workers(make_once, tmp_path, signum):
    reference, out = make_once("experiment"), tmp_path / "out"
    point = SIGNAL_POINTS["experiment, a worker in a step"]
    stopped = reference.call(out, "--workers", 2, prepare=signal_at, args=(point, signum))
    assert stop_message(stopped, signum) == f"Error: stopped by {signum.name}; run the same command again to resume"
    assert has_ended(stopped.pid)
    # The study checks for the signal twice per second; a run of few steps may finish first.
    assert [*out.glob("runs/*/checkpoint-*.safetensors"), *out.glob("runs/*/posterior.safetensors")]
    assert reference.call(out, "--workers", 2).exit_code == 0
    check_results(reference, out)


def test_an_evaluation_stops_and_resumes(world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(world.path / SVI_RUN, out)
    arguments = ("evaluate", out, "--samples", 1)
    point = SignalPoint("evaluate", "dwp_pyro.evaluation.evaluate:case_metrics", 1, AGAIN)
    stopped = run(arguments, world.path, out, prepare=signal_at, args=(point, signal.SIGTERM))
    assert stop_message(stopped, signal.SIGTERM) == "Error: stopped by SIGTERM; run the same command again to resume"
    kept = {path: path.stat().st_mtime_ns for path in (out / "predictions").glob("*.nii.gz")}
    assert kept and run(arguments, world.path, out).exit_code == 0
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in (out / "predictions").glob("*.nii.gz")}.items()
    assert (out / "evaluation.json").exists() and not list(out.rglob(".tmp-*"))


def test_a_real_process_stops_within_a_step(world, tmp_path):
    """Send SIGINT to the whole process group, as a terminal does."""
    out = tmp_path / "run"
    arguments = ("-c", "from dwp_pyro.cli import main; main()", *COMMANDS["svi"], "--steps", 100_000, "--out", out)
    line = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(line, cwd=world.path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5  # a step, a checkpoint and the exit of Python
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Error: stopped by SIGINT, checkpoint saved; resume with --resume"
    assert list(out.glob("checkpoint-*.safetensors"))
    assert not json.loads((out / "run.json").read_text())["finished"]
