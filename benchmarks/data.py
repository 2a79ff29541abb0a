"""Reading and transforming patches beside the training step that they are for.

$ python -m benchmarks.data
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch

from benchmarks.comparison import Row, ratio, report, time_in_turns
from benchmarks.steps import DEFAULT, SMALL, Scene
from dwp_pyro.config import SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.data.transforms import Patches
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.pipeline.training_data import load_training_data


def rows() -> Iterator[Row]:
    """On a CPU patches are made between the steps, so that they cost their whole time."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms("brats", Path(folder), 8, 0)
        data = load_training_data(SviConfig(root=folder, validation=1, patch=64), 5)
    for widths, side in ((DEFAULT, 64), (SMALL, 48)):
        patches = iter(Patches(data.train, (side, side, side), 0, 1000))  # type: ignore[call-overload]
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            step = Scene(widths, side, torch.device("cpu")).bayesian("dwp", 0.25, "shared")
            seconds = time_in_turns({"step": step, "patch": lambda patches=patches: next(patches)}, 25)
        figures = ratio(seconds["patch"], seconds["step"])
        where = f"widths {'-'.join(map(str, widths))}, {side}³"
        note = f"{sorted(seconds['patch'])[12] * 1e3:.1f} ms a patch"
        yield Row(f"a patch, read and transformed; {where}", "SVI step, DWP, a quarter", 0.05, *figures, note)


if __name__ == "__main__":
    report(rows())
