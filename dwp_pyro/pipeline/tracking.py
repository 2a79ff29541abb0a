"""A run in MLflow as well as in its folder, where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwp_pyro.config import RunOptions
from dwp_pyro.errors import RunError
from dwp_pyro.pipeline.metrics_log import Track
from dwp_pyro.storage import read_json, write_json

__all__ = ["check_tracker", "tracked"]

_LOCAL = "runs/mlruns"


def check_tracker(options: RunOptions) -> None:
    """Raise RunError if MLflow is asked for and not installed: ahead of everything that takes time."""
    if options.mlflow and find_spec("mlflow") is None:
        raise RunError("--mlflow: MLflow is not installed; 'pip install dwp-pyro[mlflow]', or leave the option out")


@contextmanager
def tracked(run: Path, config: Mapping[str, Any], options: RunOptions) -> Iterator[Track]:
    """A run of MLflow beside a run folder, if `options.mlflow`: settings at the start, the folder's files at the end.

    The server, the experiment and the credentials are those of MLflow's own environment variables; without
    MLFLOW_TRACKING_URI the run goes to the local folder `runs/mlruns`. `mlflow.json` keeps the run's id: resumed
    with `options.mlflow`, it goes on. Checkpoints, events of TensorBoard and subfolders stay here.

    Args:
        run: the run folder.
        config: the resolved settings.
        options: where and how.

    Yields:
        What is to be told of a stage's figures.

    Raises:
        RunError: if MLflow does not take what it is given. The run folder is as after any stop.
    """
    if not options.mlflow:
        yield lambda stage, step, figures: None
        return
    # The run of a hospital's scans tells nobody else of itself.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the one local store that needs no database
    import mlflow

    mlflow.set_tracking_uri(uri or _LOCAL)
    pin = run / "mlflow.json"
    with _told_in_one_line():
        known = read_json(pin).get("run_id") if pin.exists() else None
        active = mlflow.start_run(run_id=known, run_name=None if known else run.name)
        write_json(pin, {"run_id": active.info.run_id})
        mlflow.log_params({name: str(value) for name, value in config.items()})

    def track(stage: str, step: int, figures: Mapping[str, float]) -> None:
        with _told_in_one_line():
            mlflow.log_metrics({f"{stage}/{name}": value for name, value in figures.items()}, step=step)

    try:
        yield track
        with _told_in_one_line():
            for path in sorted(run.iterdir()):
                if path.is_file() and not path.name.startswith((".", "checkpoint", "run.json")):
                    mlflow.log_artifact(str(path))
    except BaseException as problem:
        status = "KILLED" if isinstance(problem, KeyboardInterrupt) else "FAILED"
        with suppress(RunError), _told_in_one_line():
            mlflow.end_run(status)
        raise
    with _told_in_one_line():
        mlflow.end_run()


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # MLflow raises plain ones, too
        raise RunError(
            f"MLflow: {' '.join(str(problem).split())[:300]}; mend it and give --resume, or go on without --mlflow"
        ) from problem
