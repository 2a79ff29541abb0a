"""Startup time of the command line.

$ python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.comparison import Row, ratio, report, time_in_turns


def rows() -> Iterator[Row]:
    program = str(Path(sys.executable).with_name("dwp-pyro"))
    commands = {
        "`dwp-pyro --help`": [program, "--help"],
        "`dwp-pyro svi --help`": [program, "svi", "--help"],
        "click": [sys.executable, "-c", "import click"],
    }
    run = partial(subprocess.run, check=True, capture_output=True)
    seconds = time_in_turns({name: partial(run, command) for name, command in commands.items()}, 15)
    for name in list(commands)[:2]:
        metrics = ratio(seconds[name], seconds["click"])
        yield Row(name, '`python -c "import click"`', 2, *metrics, f"{sorted(seconds[name])[7] * 1e3:.0f} ms")


if __name__ == "__main__":
    report(rows())
