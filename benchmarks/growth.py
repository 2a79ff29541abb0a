"""Growth of the cost with kernels, patch, weight samples and scan, each with a fitted exponent.

$ python -m benchmarks.growth growth.png
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.comparison import time_in_turns
from benchmarks.prediction import Volume
from benchmarks.steps import DEFAULT, SMALL, Scene
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import kernel_sites

_CPU = torch.device("cpu")


def _step(widths: tuple[int, int, int, int], patch: int) -> Callable[[], object]:
    return Scene(widths, patch, _CPU).bayesian("dwp", "weight-sample")


def _kernels(widths: tuple[int, int, int, int]) -> int:
    return sum(kernel.shape[0] * kernel.shape[1] for kernel in kernel_sites(ResidualUNet3d(1, 2, widths)).values())


def curves() -> dict[str, tuple[list[float], list[float]]]:
    """Return quantity → sizes and seconds."""
    found = {}

    def measure(name: str, sides: dict[float, Callable[[], object]], rounds: int) -> None:
        seconds = time_in_turns({str(size): side for size, side in sides.items()}, rounds)
        found[name] = (list(sides), [statistics.median(values) for values in seconds.values()])
        print(name, *(f"{size:.4g}: {value:.3g} s" for size, value in zip(*found[name], strict=True)), sep="  ")

    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        all_widths = [(4, 8, 16, 32), SMALL, DEFAULT, (24, 48, 96, 192)]
        measure("kernels (step, patch 32³)", {_kernels(widths): _step(widths, 32) for widths in all_widths}, 9)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        measure("voxels of the patch (step)", {side**3: _step(DEFAULT, side) for side in (32, 48, 64, 80)}, 7)
    volume = Volume((96, 96, 96))
    samples = {count: lambda count=count: volume.bayesian(count) for count in (1, 2, 4, 8)}
    measure("weight samples (prediction of 96³)", samples, 5)
    volumes = {side**3: Volume((side, side, side)) for side in (64, 96, 128, 160)}
    scans = {size: lambda one=one: one.bayesian(1) for size, one in volumes.items()}
    measure("voxels of the scan (prediction, S = 1)", scans, 3)
    return found


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return b of seconds ∝ sizeᵇ by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main(picture: Path) -> None:
    found = curves()
    figure = Figure(figsize=(3.2 * len(found), 3), layout="constrained")
    for axis, (name, (sizes, seconds)) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axis.loglog(sizes, seconds, "o-")
        for line in (axis.xaxis, axis.yaxis):
            line.set_minor_formatter(NullFormatter())
        axis.set_title(f"exponent {exponent(sizes, seconds):.2f}")
        axis.set_xlabel(name)
        axis.set_ylabel("seconds")
        print(f"| {name} | {exponent(sizes, seconds):.2f} |")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
