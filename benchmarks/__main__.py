"""Every benchmark, in one table; exit code 1 if a row misses its target.

$ make bench
"""

from __future__ import annotations

import platform
from itertools import chain

import torch

from benchmarks import bound, data, memory, prediction, priors, startup, steps
from benchmarks.comparison import report

print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
report(chain.from_iterable(part.rows() for part in (steps, bound, data, startup, prediction, memory, priors)))
