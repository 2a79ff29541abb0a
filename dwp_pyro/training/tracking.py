"""Optional logging of runs to MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwp_pyro.config.base import RunOptions
from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import read_json, write_json
from dwp_pyro.training.metrics_log import Track, no_track

__all__ = ["check_tracker", "tracked"]

_LOCAL = "runs/mlruns"


def check_tracker(options: RunOptions) -> None:
    """Raise RunError if MLflow is requested but not installed; called before the work starts."""
    if options.mlflow and find_spec("mlflow") is None:
        raise RunError("MLflow is not installed; 'pip install dwp-pyro[mlflow]', or do not log to it")


@contextmanager
def tracked(run: Path, config: Mapping[str, Any], options: RunOptions) -> Iterator[Track]:
    """Log a run to MLflow if `options.mlflow`: settings at the start, metrics, and the folder's files at the end.

    Server, experiment and credentials are those of MLflow's environment variables; without MLFLOW_TRACKING_URI the run
    is logged to the local folder `runs/mlruns`. `mlflow.json` keeps the run's id, so that a resumed run continues the
    same MLflow run. Checkpoints, TensorBoard events and subfolders are not uploaded.

    Yields:
        Function that logs the metrics of a step.

    Raises:
        RunError: if MLflow fails; the run can be resumed.
    """
    if not options.mlflow:
        yield no_track
        return
    # Runs on patient data must not send telemetry.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the only local store without a database
    import mlflow

    mlflow.set_tracking_uri(uri or _LOCAL)
    pin = run / "mlflow.json"
    with _as_run_error():
        known = read_json(pin).get("run_id") if pin.exists() else None
        active = mlflow.start_run(run_id=known, run_name=None if known else run.name)

    def track(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        with _as_run_error():
            mlflow.log_metrics({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    try:
        with _as_run_error():
            write_json(pin, {"run_id": active.info.run_id})
            mlflow.log_params({name: str(value) for name, value in config.items()})
        yield track
        with _as_run_error():
            for path in sorted(run.iterdir()):
                if path.is_file() and not path.name.startswith((".", "checkpoint", "run.json")):
                    mlflow.log_artifact(str(path))
    except BaseException as problem:
        status = "KILLED" if isinstance(problem, KeyboardInterrupt) else "FAILED"
        with suppress(RunError), _as_run_error():
            mlflow.end_run(status)
        raise
    with _as_run_error():
        mlflow.end_run()


@contextmanager
def _as_run_error() -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # MLflow also raises plain exceptions
        raise RunError(
            f"MLflow: {' '.join(str(problem).split())[:300]}; fix this and resume, or resume without MLflow"
        ) from problem
