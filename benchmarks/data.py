"""Reading and transforming patches beside the training step that they are for.

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
from dwp_pyro.config import SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.data.transforms import Batch, Patches
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.svi import patch_loader
from dwp_pyro.pipeline.training_data import load_training_data


def rows(device: torch.device) -> Iterator[Row]:
    """On a CPU patches are made between the steps, and cost their whole time; beside a GPU, by other processes."""
    keep_freed_memory()
    sizes = SIZES[device.type]
    largest = max(side for _, side in sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms("brats", Path(folder), 4, 0, shape=(largest + 32,) * 3)
        data = load_training_data(SviConfig(root=folder, validation=1, patch=largest), 2)
    for widths, side in sizes:
        patches = Patches(data.train, (side, side, side), 0, 1000)
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            step = Scene(widths, side, device).bayesian("dwp", 0.25, "shared")
            batches = iter(patch_loader(patches, 1, device))

            def patch(batches: Iterator[Batch] = batches) -> None:
                for part in next(batches):
                    part.to(device, non_blocking=True)

            seconds = time_in_turns({"step": step, "patch": patch}, 25, device)
        figures = ratio(seconds["patch"], seconds["step"])
        where = f"widths {'-'.join(map(str, widths))}, {side}³"
        note = f"{statistics.median(seconds['patch']) * 1e3:.1f} ms a patch"
        yield Row(f"a patch, read and transformed; {where}", "SVI step, DWP, a quarter", 0.05, *figures, note)


if __name__ == "__main__":
    report(rows(chosen().device))
