"""The metrics of a resumed training: no step twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dwp_pyro.training.metrics_log import MetricsLog, no_track, read_metrics


@pytest.mark.parametrize("start", [0, 10])
def test_later_steps_are_dropped(tmp_path: Path, start: int):
    """Also from step 0, after a kill before the first checkpoint."""
    for first, loss in ((0, 1.0), (start, 2.0)):
        with MetricsLog(tmp_path, "svi", first, no_track) as log:
            for step in range(first + 10, 40, 10):
                log(step, {"loss": loss})
    expected = [(step, 1.0 if step <= start else 2.0) for step in (10, 20, 30)]
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard/svi")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
