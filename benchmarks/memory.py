"""Peak memory of a step and of a prediction; on a CPU that of a whole process per side.

$ python -m benchmarks.memory [--device cuda]
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyro
import torch

from benchmarks.comparison import Row, chosen, report
from benchmarks.prediction import Volume
from benchmarks.steps import DEFAULT, SIZES, Scene

_STEPS = 3
_CPU = torch.device("cpu")


def _steps(kind: str, device: torch.device = _CPU) -> None:
    scene = Scene(DEFAULT, dict(SIZES[device.type])[DEFAULT], device)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        step = scene.deterministic() if kind == "deterministic" else scene.bayesian("dwp", "weight-sample")
        for _ in range(_STEPS):
            step()


def _passes(count: int, device: torch.device = _CPU) -> None:
    volume = Volume(device=device)
    for _ in range(count):
        volume.deterministic()


def _samples(count: int, device: torch.device = _CPU) -> list[float]:
    """Return the MiB in use after each sample."""
    used: list[float] = []
    Volume(device=device).bayesian(count, lambda: used.append(_in_use(device)))
    return used


class _Mallinfo2(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _in_use(device: torch.device) -> float:
    """Return the MiB allocated now, without freed memory that the process keeps."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def _peak_of_this_process() -> float:
    # getrusage would include the memory of the parent at the fork.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _run(side: str, device: torch.device) -> tuple[float, list[float]]:
    """Return the peak MiB of a side, and the MiB in use after each sample."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        used = _side(side, device)
        return torch.cuda.max_memory_reserved(device) / 2**20, used  # a captured graph keeps its memory
    output = subprocess.run([sys.executable, "-m", "benchmarks.memory", side], check=True, capture_output=True)
    peak, used = json.loads(output.stdout)
    return peak, used


def _side(side: str, device: torch.device) -> list[float]:
    what, which = side.split()
    if what == "step":
        _steps(which, device)
    elif what == "passes":
        _passes(int(which), device)
    else:
        return _samples(int(which), device)
    return []


def rows(device: torch.device) -> Iterator[Row]:
    (plain, _), (dwp, _) = _run("step deterministic", device), _run("step dwp", device)
    patch = dict(SIZES[device.type])[DEFAULT]
    what = f"peak memory: SVI step, `weight-sample`, DWP, all kernels; widths 16-32-64-128, {patch}³"
    torch_too = ", torch included" if device.type == "cpu" else ""
    yield Row(what, "deterministic step", 1.30, *[dwp / plain] * 3, f"{dwp:.0f} and {plain:.0f} MiB{torch_too}")
    # The same number of passes on both sides: fragmentation makes each pass take a little more memory.
    (plain, _), (peak, used) = _run("passes 6", device), _run("samples 6", device)
    note = f"{peak:.0f} and {plain:.0f} MiB"
    yield Row("peak memory: prediction, S = 6", "6 deterministic passes", 1.2, *[peak / plain] * 3, note)
    note = f"{used[5]:.0f} and {used[1]:.0f} MiB"
    yield Row("memory in use after sample 6", "after sample 2", 1.02, *[used[5] / used[1]] * 3, note)


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):  # one side, started by `_run`
        used = _side(sys.argv[1], _CPU)
        print(json.dumps((_peak_of_this_process(), used)))
    else:
        report(rows(chosen().device))
