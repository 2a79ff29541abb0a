"""Thirty minutes of `experiment` with small cells, killed again and again: it ends as an undisturbed run does, and
neither memory nor open files grow.

$ python -m tests.faults.soak --minutes 30
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.cli.conftest import TINY
from tests.faults.test_kill import STUDY, results

_SEEDS = 12  # of two arms: cells enough for a process to grow over
_LIFE = (4.0, 25.0)  # seconds until a kill; the first are spent on importing torch
_COMMAND = (sys.executable, "-c", "from dwp_pyro.cli import main; main()")


def _call(folder: Path, *arguments: object) -> None:
    subprocess.run([*_COMMAND, *map(str, arguments)], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [*_COMMAND, "--quiet", "experiment", "study.yaml", "--out", str(out), "--workers", "2"]
    return subprocess.Popen(command, cwd=folder, start_new_session=True)


def _family(pid: int) -> Iterator[tuple[float, int]]:
    """MiB in memory and open files of a process, and of those that it started."""
    for process in (pid, *_children(pid)):
        try:
            status = Path(f"/proc/{process}/status").read_text().split()
            files = len(os.listdir(f"/proc/{process}/fd"))
        except (OSError, ValueError):  # it has just ended
            continue
        if "VmRSS:" in status:
            yield int(status[status.index("VmRSS:") + 1]) / 1024, files


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _undisturbed(folder: Path, out: Path) -> list[tuple[float, int]]:
    """Run a study to its end; the largest memory, and the most open files, of its processes, second by second."""
    process = _start(folder, out)
    seen = []
    while process.poll() is None:
        largest = list(_family(process.pid))
        if largest:
            seen.append((max(memory for memory, _ in largest), max(files for _, files in largest)))
        time.sleep(1)
    assert process.returncode == 0, process.returncode
    return seen


def _killed(folder: Path, out: Path, moments: random.Random) -> int:
    """Run a study to its end, by kills; returns how many."""
    kills = 0
    while True:
        process = _start(folder, out)
        try:
            code = process.wait(moments.uniform(*_LIFE))
        except subprocess.TimeoutExpired:
            # Now the parent alone, whose workers must notice, now all at once, as a scheduler does.
            kill = os.kill if moments.random() < 0.5 else os.killpg
            kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(1)
        else:
            assert code == 0, code
            return kills


def _soak(minutes: float) -> None:
    end = time.monotonic() + 60 * minutes
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, cases in (("ms", 6), ("brats", 9)):
            _call(folder, "phantom", name, f"data/{name}", "--cases", cases)
        _call(folder, "fit-prior", *TINY, "--bootstraps", 2, "--vae-steps", 20)
        cells = [{"arms": ["DWP", "UNet-PR"], "n": [2], "seeds": list(range(_SEEDS))}]
        (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"cells": cells}))
        seen = _undisturbed(folder, folder / "undisturbed")
        third = len(seen) // 3
        for number, what in enumerate(("MiB in memory", "open files")):
            early, late = ([each[number] for each in part] for part in (seen[third : 2 * third], seen[-third:]))
            print(f"{what}, largest process: {statistics.median(early):.0f} in the middle third of {2 * _SEEDS} cells,")
            print(f"  {statistics.median(late):.0f} in the last; at most {max(each[number] for each in seen):.0f}")
        expected = results(folder / "undisturbed")
        studies = kills = 0
        while time.monotonic() < end:
            out = folder / f"killed{studies}"
            kills += _killed(folder, out, moments)
            studies += 1
            found = results(out)
            different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            assert not different, different
            print(f"{studies} studies, {kills} kills: each ends in the bits of the undisturbed one", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    _soak(parser.parse_args().minutes)
