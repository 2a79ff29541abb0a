"""All benchmarks in one table; exit code 1 if a row misses its target.

$ make bench
$ python -m benchmarks --device cuda    # those that use a GPU
"""

from __future__ import annotations

import platform
from itertools import chain

import torch

from benchmarks import bound, data, memory, prediction, priors, startup, steps
from benchmarks.comparison import chosen, report

device = chosen().device
print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
parts = [part.rows(device) for part in (steps, bound, data, prediction, memory)]
if device.type == "cpu":
    parts += [startup.rows(), priors.rows()]
report(chain.from_iterable(parts))
