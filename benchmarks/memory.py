"""Peak memory of a step and of a prediction, each side in a process of its own.

$ python -m benchmarks.memory
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch

from benchmarks.comparison import Row, report
from benchmarks.prediction import Volume
from benchmarks.steps import DEFAULT, Scene
from dwp_pyro.inference.allocator import keep_freed_memory

_STEPS = 3


def _steps(kind: str) -> None:
    scene = Scene(DEFAULT, 64, torch.device("cpu"))
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        step = scene.deterministic() if kind == "deterministic" else scene.bayesian("dwp", 1.0, "shared")
        for _ in range(_STEPS):
            step()


def _prediction(samples: int) -> None:
    volume = Volume()
    volume.deterministic() if samples == 0 else volume.bayesian(samples)


def _peak_of_this_process() -> float:
    # Not getrusage, which counts what the parent held when it forked.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _peak(side: str) -> float:
    """MiB that the whole process of a side took at most."""
    output = subprocess.run([sys.executable, "-m", "benchmarks.memory", side], check=True, capture_output=True)
    return float(output.stdout)


def rows() -> Iterator[Row]:
    plain, dwp = _peak("step deterministic"), _peak("step dwp")
    what = "peak memory: SVI step, `shared`, DWP, all kernels; widths 16-32-64-128, 64³"
    yield Row(what, "deterministic step", 1.30, *[dwp / plain] * 3, f"{dwp:.0f} and {plain:.0f} MiB, torch included")
    single, one, few, many = (_peak(f"prediction {samples}") for samples in (0, 1, 3, 9))
    note = f"{one:.0f} and {single:.0f} MiB"
    yield Row("peak memory: prediction, S = 1", "deterministic pass", 1.2, *[one / single] * 3, note)
    yield Row("peak memory: prediction, S = 9", "S = 3", 1.02, *[many / few] * 3, f"{many:.0f} and {few:.0f} MiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep_freed_memory()
        what, _, which = sys.argv[1].partition(" ")
        _steps(which) if what == "step" else _prediction(int(which))
        print(_peak_of_this_process())
    else:
        report(rows())
