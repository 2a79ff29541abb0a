"""Progress as log records, and no output without logging."""

from __future__ import annotations

import logging

import pytest

import dwp_pyro.runtime.progress
from dwp_pyro.runtime.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Value of `time.monotonic`, set by the tests."""
    now = [0.0]
    monkeypatch.setattr(dwp_pyro.runtime.progress.time, "monotonic", lambda: now[0])
    return now


def work(clock: list[float]) -> None:
    """Run four items of 6 s each, after one of an earlier run."""
    with progress("pieces", 5, 1) as advance:
        for piece in range(4):
            clock[0] += 6
            advance(f"note {piece}")


def test_one_record_per_ten_seconds_and_one_at_the_end(clock, caplog):
    caplog.set_level(logging.INFO, "dwp_pyro")
    work(clock)
    assert caplog.messages == ["pieces: 3/5, 12 s left  note 1", "pieces: 5/5, 0 s left  note 3"]
    pieces = {"what": "pieces", "total": 5}
    assert [record.progress for record in caplog.records] == [
        {**pieces, "done": 3, "seconds_left": 12.0, "note": "note 1"},
        {**pieces, "done": 5, "seconds_left": 0.0, "note": "note 3"},
    ]


def test_a_program_without_logging_is_silent(clock, capsys):
    work(clock)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
