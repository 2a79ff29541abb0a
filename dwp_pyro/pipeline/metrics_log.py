"""The figures of a run over time: `metrics.jsonl`, TensorBoard events, and a tracker's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard.writer import SummaryWriter

from dwp_pyro.storage import write_bytes, written

__all__ = ["MetricsLog", "Track", "read_metrics"]

#: Called with a stage, a step and its figures.
Track = Callable[[str, int, Mapping[str, float]], None]


class MetricsLog:
    """Appends figures; a context, to be called with a step and its figures.

    Args:
        folder: of the run.
        stage: what the steps count, e.g. "svi" or "bootstrap0".
        start: steps that the checkpoint stands for; later lines of the stage, which the resumed run will
            write again, are dropped.
        track: told of each step's figures too.
    """

    def __init__(self, folder: Path, stage: str, start: int, track: Track) -> None:
        self.path = folder / "metrics.jsonl"
        self.stage = stage
        self._track = track
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        kept = [line for line in lines if not self._is_later(line, start)]
        write_bytes(self.path, b"".join(line + b"\n" for line in kept))
        # A folder a stage: purging drops every later event of a folder, of whatever stage.
        self._writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=start + 1 if start else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        with written(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._track(self.stage, step, figures)

    def _is_later(self, line: bytes, start: int) -> bool:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the line that a kill cut short
            return True
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return False  # not ours to drop
        return record.get("stage") == self.stage and record["step"] > start


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, if it has kept them; those that a kill cut short are left out.

    Returns:
        {"stage", "step" and figures} of each, which are numbers.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("stage"), str) and isinstance(record.get("step"), int):
            figures = {name: value for name, value in record.items() if _is_number(value)}
            records.append({**figures, "stage": record["stage"]})
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300
