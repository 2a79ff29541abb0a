"""Metrics of a run over time: `metrics.jsonl`, TensorBoard events and an experiment tracker."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard.writer import SummaryWriter

from dwp_pyro.runtime.files import locked, write_bytes, written

__all__ = ["MetricsLog", "Track", "no_track", "read_metrics"]

#: Function of a stage, a step and its metrics.
Track = Callable[[str, int, Mapping[str, float]], None]


class MetricsLog:
    """Context manager that logs the metrics of each step that it is called with.

    Several processes may log stages of one run.

    Args:
        folder: Run folder.
        stage: Name of the training whose steps are counted, e.g. "svi" or "bootstrap0".
        start: Steps of the checkpoint; later lines of the stage are dropped, because a resumed run writes them again.
        track: Function that also receives the metrics of each step.
    """

    def __init__(self, folder: Path, stage: str, start: int, track: Track) -> None:
        self.path = folder / "metrics.jsonl"
        self.stage = stage
        self._track = track
        with self._exclusive():
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
            kept = [line for line in lines if not self._is_later(line, start)]
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))
        # One folder per stage, because purging drops all later events of a folder.
        self._writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=start + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        with written(self.path):
            self.path.stat()  # a folder that was removed must not come back
        with self._exclusive(), written(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._track(self.stage, step, metrics)

    def _exclusive(self) -> AbstractContextManager[None]:
        return locked(self.path.parent, ".lock-metrics", wait=True)

    def _is_later(self, line: bytes, start: int) -> bool:
        record = _parse(line)
        return record is None or (record["stage"] == self.stage and record["step"] > start)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `metrics.jsonl`, if it exists; truncated lines are skipped.

    Returns:
        "stage", "step" and the finite metrics of each line.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if (record := _parse(line)) is not None:
            metrics = {name: value for name, value in record.items() if _is_number(value)}
            records.append({**metrics, "stage": record["stage"]})
    return records


def no_track(stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Do nothing with the metrics of a step: a `Track` of runs without a tracker, and of workers."""


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None for a line truncated by a kill, or without a stage and a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    complete = isinstance(record, dict) and isinstance(record.get("stage"), str) and isinstance(record.get("step"), int)
    return record if complete else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300
