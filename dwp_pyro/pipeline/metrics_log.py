"""The figures of a run over time: `metrics.jsonl`, TensorBoard events, and a tracker's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from torch.utils.tensorboard.writer import SummaryWriter

from dwp_pyro.storage import write_bytes

__all__ = ["MetricsLog", "Track"]

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
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if not self._is_later(line, start)]
        write_bytes(self.path, "".join(line + "\n" for line in kept).encode())
        # A folder a stage: purging drops every later event of a folder, of whatever stage.
        self._writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=start + 1 if start else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._track(self.stage, step, figures)

    def _is_later(self, line: str, start: int) -> bool:
        try:
            record = json.loads(line)
        except ValueError:  # the line that a kill cut short
            return True
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return False  # not ours to drop
        return record.get("stage") == self.stage and record["step"] > start
