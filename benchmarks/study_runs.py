"""Runs of a study that take no time: what each costs beside its work, in processes and on a Dask cluster.

$ python -m benchmarks.study_runs [--runs 1000]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from distributed import Client

from benchmarks.comparison import Row as Result
from benchmarks.comparison import chosen, report
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.metrics import MEASURES
from dwp_pyro.runtime.workers import Workers
from dwp_pyro.study import runner
from dwp_pyro.study.comparison import Row
from dwp_pyro.study.grid import Study

_TARGET = 25.0  # ms
_WORKERS = 2


def _no_work(task: runner._Task) -> list[Row]:
    method, n, seed = task.study_run.key
    measures = dict.fromkeys(MEASURES, 0.5)
    return [Row(method, n, seed, case.id, measures, 0.0, task.settings, case.id) for case in task.data.cases]


def _study(folder: Path, runs: int) -> Study:
    write_phantoms("brats", folder / "data", 9, shape=(28, 32, 28))
    settings = {"root": str(folder / "data"), "widths": [2, 3, 4, 5], "patch": 24, "validation": 1, "spacing": 2.0}
    methods = {"UNet-RI": {"command": "finetune", "init": "random"}}
    listed = [{"methods": list(methods), "n": [2], "seeds": list(range(runs))}]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"settings": settings, "methods": methods, "runs": listed, "samples": 1}))
    return Study.read(path)


def _cost(study: Study, out: Path, workers: Workers, name: str) -> Result:
    start = time.monotonic()
    runner.experiment(study, out, workers=workers)
    cost = (time.monotonic() - start) / len(study.runs) * 1000
    return Result(f"a run of a study of {len(study.runs)} ({name})", "its work, ms", _TARGET, cost, cost, cost)


def main() -> None:
    runner._run = _no_work  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study, scheduler = _study(folder, chosen(runs=1000).runs), folder / "scheduler.json"
        quiet = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "env": os.environ | {"OMP_NUM_THREADS": "1"},
        }
        own = ("--scheduler-file", str(scheduler), "--no-dashboard")
        commands = [("dask_scheduler", *own, "--port", "0"), *[("dask_worker", *own, "--nthreads", "1")] * _WORKERS]
        cluster = [
            subprocess.Popen([sys.executable, "-m", f"distributed.cli.{command}", *rest], **quiet)
            for command, *rest in commands
        ]
        try:
            while not scheduler.exists():
                time.sleep(0.1)
            with Client(scheduler_file=str(scheduler)) as client:
                client.wait_for_workers(_WORKERS, timeout=120)
            report(
                [
                    _cost(
                        study, folder / "cluster", Workers(cluster=str(scheduler)), f"{_WORKERS} workers of a cluster"
                    ),
                    _cost(study, folder / "processes", Workers(_WORKERS), f"{_WORKERS} processes"),
                ]
            )
        finally:
            for process in reversed(cluster):
                process.terminate()
                process.wait(30)


if __name__ == "__main__":
    main()
