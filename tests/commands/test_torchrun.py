"""`torchrun`: one run by several processes, which prints once, and resumes with another number of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dwp_pyro.inference.posterior import Posterior
from tests.world import SVI_RUN, TINY

pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCH = (*TORCHRUN, "-m", "dwp_pyro", "--")
SVI = ("svi", "--n", "2", *map(str, TINY), "--members", "1")


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [*LAUNCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def errors_in(text: str) -> list[str]:
    """Return the lines of the package; torchrun adds its own."""
    return [line for line in text.splitlines() if line.startswith("Error: ")]


def processes_of(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def test_commands_run_in_two_processes(in_world, tmp_path):
    out = tmp_path / "run"
    result = torchrun(*SVI, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"Run: {out}") == 1
    assert Posterior.load(out / "posterior.safetensors").members
    assert not list(out.glob("checkpoint*"))
    again = torchrun(*SVI, "--out", out)
    assert again.returncode != 0
    (line,) = errors_in(again.stderr)
    assert "holds a finished run" in line
    for command in (
        ("finetune", "--n", 2, *TINY, "--out", tmp_path / "tuned"),
        ("fit-prior", *TINY, "--bootstraps", 1, "--density-steps", 2, "--out", tmp_path / "prior"),
        ("predict", out, "data/brats", "--samples", 1, "--out", tmp_path / "maps"),
    ):
        result = torchrun(*command)
        assert result.returncode == 0, result.stderr
    assert "9 cases in" in result.stdout
    assert "predicting: 5/5" in result.stderr  # the share of process 0
    assert len(list((tmp_path / "maps").glob("*_seg.nii.gz"))) == 9


def test_a_killed_process_ends_the_run_and_one_process_resumes_it(in_world, tmp_path):
    out = tmp_path / "run"
    long = ("svi", "--n", "2", *map(str, TINY), "--members", "1", "--steps", "400", "--out", str(out))
    launcher = subprocess.Popen([*LAUNCH, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path(out) / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    workers = processes_of(launcher.pid)
    os.kill(max(workers), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    (line,) = errors_in(errors)
    assert "another process of this run has ended; the checkpoint of step" in line and "--resume" in line
    assert not (out / "posterior.safetensors").exists()
    environment = os.environ | {"WORLD_SIZE": "2"}  # of a scheduler, which has not started this process
    resumed = subprocess.run(
        [sys.executable, "-m", "dwp_pyro", *long, "--resume"], capture_output=True, text=True, env=environment
    )
    assert resumed.returncode == 0, resumed.stderr
    assert Posterior.load(out / "posterior.safetensors").members


def test_a_bad_scan_of_another_process_is_named_by_the_first(copy_of_world, tmp_path):
    """Process 1 checks the second case; process 0 prints its error, and nothing is written."""
    scan = sorted(Path("data/brats").rglob("*_flair.nii.gz"))[1]
    scan.write_bytes(scan.read_bytes()[:200])
    result = torchrun("predict", SVI_RUN, "data/brats", "--samples", 1, "--out", tmp_path / "maps")
    assert result.returncode != 0
    (line,) = errors_in(result.stderr)
    assert scan.name in line
    assert not (tmp_path / "maps").exists()
