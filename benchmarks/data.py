"""Time to read and transform a patch against a training step.

$ python -m benchmarks.data [--device cuda]
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch

from benchmarks.comparison import Row, chosen, ratio, report, time_in_turns
from benchmarks.steps import SIZES, Scene
from dwp_pyro.config.training import SviConfig
from dwp_pyro.data.patches import Batch, PatchDataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.inference.loop import patch_loader
from dwp_pyro.training.training_data import load_training_data


def rows(device: torch.device) -> Iterator[Row]:
    """Measure patches in the process of the training; with a GPU, in worker processes."""
    sizes = SIZES[device.type]
    largest = max(side for _, side in sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms("brats", Path(folder), 4, 0, shape=(largest + 32,) * 3)
        data = load_training_data(SviConfig(root=folder, validation=1, patch=largest), 2)
    for widths, side in sizes:
        patches = PatchDataset(data.train, (side, side, side), 0, 1000)
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            step = Scene(widths, side, device).bayesian("dwp", "weight-sample")
            batches = iter(patch_loader(patches, 1, device))

            def patch(batches: Iterator[Batch] = batches) -> None:
                for part in next(batches):
                    part.to(device, non_blocking=True)

            seconds = time_in_turns({"step": step, "patch": patch}, 25, device)
        metrics = ratio(seconds["patch"], seconds["step"])
        where = f"widths {'-'.join(map(str, widths))}, {side}³"
        note = f"{statistics.median(seconds['patch']) * 1e3:.1f} ms per patch"
        yield Row(
            f"reading and transforming a patch; {where}",
            "SVI step, DWP, all kernels",
            0.05,
            *metrics,
            note,
        )


if __name__ == "__main__":
    report(rows(chosen().device))
