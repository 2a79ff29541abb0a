"""400 cases of 96³ with four modalities: memory of the process, and a step with a patch of them.

$ python -m benchmarks.many_cases
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from monai.data import MetaTensor

from benchmarks.comparison import Row, ratio, report, time_in_turns
from benchmarks.steps import DEFAULT, SIZES, Scene
from dwp_pyro.commands.process import tune_process
from dwp_pyro.data.mapped import mapped
from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.data.preprocessing import Example, class_indices

_CASES, _IN_MEMORY = 400, 4
_SHAPE = (96, 96, 96)
_TIMES = 25


def _example(number: int) -> Example:
    torch.manual_seed(number)
    label = torch.zeros(1, *_SHAPE, dtype=torch.uint8)
    label[:, 40:60, 40:60, 40:60] = 1
    brain_mask = MetaTensor(torch.ones(1, *_SHAPE, dtype=torch.uint8))
    indices = class_indices(MetaTensor(label), brain_mask)
    return Example(str(number), MetaTensor(torch.randn(4, *_SHAPE)), brain_mask, MetaTensor(label), indices)


def _anonymous_memory() -> float:
    """Return the memory of this process in GiB that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def rows() -> Iterator[Row]:
    tune_process()
    device = torch.device("cpu")
    side = dict(SIZES["cpu"])[DEFAULT]
    examples = {
        "mapped": [mapped(_example(number)) for number in range(_CASES)],
        "in memory": [_example(number) for number in range(_IN_MEMORY)],
    }
    numbers = itertools.count()
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        step = Scene(DEFAULT, side, device).bayesian("normal", "weight-sample")
        patches = {name: PatchDataset(each, (side,) * 3, 0, 10**6) for name, each in examples.items()}

        def patch_and_step(name: str) -> None:
            patches[name][next(numbers)]
            step()

        sides = {name: (lambda name=name: patch_and_step(name)) for name in patches}
        seconds = time_in_turns(sides, _TIMES, device)
    note = f"{_anonymous_memory():.2f} GiB of anonymous memory with {_IN_MEMORY} cases in memory and {_CASES} mapped"
    what = f"patch and step, {_CASES} mapped cases of 96³ × 4"
    yield Row(what, "cases in memory", 1.05, *ratio(*seconds.values()), note)


if __name__ == "__main__":
    report(rows())
