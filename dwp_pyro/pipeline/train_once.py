"""What `demo` and `experiment` share: a run that is finished is not made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dwp_pyro.config import RunOptions
from dwp_pyro.storage import read_json

__all__ = ["train_once"]


def train_once(train: Callable[[RunOptions], object], run: Path, device: str) -> None:
    """Train unless the run is finished; resume it if it was begun."""
    state = read_json(run / "run.json") if (run / "run.json").exists() else None
    if state is None or not state.get("finished"):
        train(RunOptions(run, device, resume=state is not None))
