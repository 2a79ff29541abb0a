"""`--cluster`: a Dask scheduler with two workers, one of which is killed, and a scheduler that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

import dwp_pyro.runtime.cluster as cluster_module
from tests.commands.test_experiment import STUDY, runs_of, without_seconds, write
from tests.world import SVI_RUN, TINY, call, error_line

pytestmark = pytest.mark.slow

LONG = {"settings": {**STUDY["settings"], "steps": 60}, "runs": [{**STUDY["runs"][0], "seeds": [0]}]}


class Cluster:
    """Scheduler and two workers of one thread each, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        start = (sys.executable, "-m", "distributed.cli.dask_scheduler")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
        self.scheduler = subprocess.Popen(
            [*start, "--port", "0", "--no-dashboard", "--scheduler-file", self.file], **quiet
        )
        worker = (sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", self.file, "--nthreads", "1")
        self.workers = [subprocess.Popen([*worker, "--no-dashboard"], **quiet) for _ in range(2)]
        for _ in range(600):
            if self.file.exists():
                break
            time.sleep(0.1)
        with Client(scheduler_file=str(self.file)) as client:
            client.wait_for_workers(2, timeout=120)

    def pids(self) -> list[int]:
        with Client(scheduler_file=str(self.file)) as client:
            return list(client.run(os.getpid).values())

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.terminate()
        for process in (*self.workers, self.scheduler):
            process.wait(30)


@pytest.fixture
def cluster(in_world: Path, tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path)
    yield started
    started.stop()


def begin(study: Path, out: Path, *arguments: object) -> subprocess.Popen:
    """Start a study on one core, so that a worker of its own has as many threads as one of the cluster."""
    command = [sys.executable, "-m", "dwp_pyro", "experiment", study, "--out", out, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=_one_core
    )


def _one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def wait_for_training(out: Path) -> None:
    for _ in range(1200):
        if list(out.glob("runs/*/metrics.jsonl")):
            return
        time.sleep(0.1)
    raise AssertionError("nothing was trained")


def test_a_killed_worker_is_replaced_and_results_are_those_of_one_process(cluster, tmp_path):
    study, out = write(tmp_path, **LONG), tmp_path / "out"
    running = begin(study, out, "--cluster", cluster.file)
    wait_for_training(out)
    os.kill(cluster.pids()[0], signal.SIGKILL)
    printed, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert "Dashboard of the cluster: http" in printed
    alone = begin(study, tmp_path / "alone")
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors
    found, expected = ({tuple(row.items()) for row in without_seconds(each)} for each in (out, tmp_path / "alone"))
    assert found == expected and len(runs_of(out)) == 2


def test_a_scheduler_that_ends_is_one_line_and_the_command_resumes(cluster, tmp_path):
    study, out = write(tmp_path, **LONG), tmp_path / "out"
    running = begin(study, out, "--cluster", cluster.file)
    wait_for_training(out)
    cluster.scheduler.kill()
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2
    line = error_line(errors)
    assert "the scheduler has ended; start it, and resume the command" in line
    cluster.stop()
    resumed = begin(study, out)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert len(runs_of(out)) == 2


def test_members_bootstraps_and_cases_are_those_of_one_process(cluster, in_world, tmp_path):
    svi = ("svi", "--dataset", "brats", "--prior", "dwp", "--n", 2, *TINY, "--members", 2)
    run, prior, maps = (tmp_path / name for name in ("run", "prior", "maps"))
    for command in (
        (*svi, "--out", run),
        ("fit-prior", *TINY, "--bootstraps", 2, "--density-steps", 20, "--out", prior),
        ("predict", SVI_RUN, "data/two", "--samples", 1, "--out", maps),
        ("evaluate", run, "--samples", 1),
    ):
        result = call(*command, "--cluster", cluster.file)
        assert result.exit_code == 0, result.output
    for folder, alone, name in ((run, SVI_RUN, "posterior"), (prior, "runs/prior-ms", "prior")):
        assert (folder / f"{name}.safetensors").read_bytes() == Path(alone, f"{name}.safetensors").read_bytes()
    assert len(list(maps.glob("*_seg.nii.gz"))) == 2
    assert len((run / "evaluation.csv").read_text().splitlines()) > 2


def test_a_scheduler_file_that_is_missing_is_not_waited_for_forever(in_world, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "_FILE_TIMEOUT", 0.1)
    result = call("experiment", write(tmp_path), "--out", tmp_path / "out", "--cluster", "none.json")
    assert result.exit_code == 2
    assert "none.json: no such file of a scheduler; start one" in result.output


def test_without_a_scheduler_the_error_names_it(in_world, tmp_path):
    result = call("experiment", write(tmp_path), "--out", tmp_path / "out", "--cluster", "tcp://127.0.0.1:1")
    assert result.exit_code == 2
    assert "tcp://127.0.0.1:1: no scheduler of a cluster answers; start one with 'dask scheduler'" in result.output
