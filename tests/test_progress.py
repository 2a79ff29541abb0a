"""Progress for people, for logs and for nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

import pytest

import dwp_pyro.progress
from dwp_pyro.progress import fail, message, progress, set_style


@pytest.fixture(autouse=True)
def _speak_as_before() -> Iterator[None]:
    yield
    set_style("text")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `time.monotonic` says; to be set by a test."""
    now = [0.0]
    monkeypatch.setattr(dwp_pyro.progress.time, "monotonic", lambda: now[0])
    return now


def work(clock: list[float]) -> None:
    """Four pieces of 6 s each, of which an earlier run had done one."""
    message("begin")
    with progress("pieces", 5, 1) as advance:
        for piece in range(4):
            clock[0] += 6
            advance(f"note {piece}")
    fail("too bad")


def test_a_log_has_a_line_in_ten_seconds_and_one_at_the_end(clock, capsys):
    work(clock)
    said = capsys.readouterr()
    assert said.out == "begin\n"
    assert said.err.splitlines() == [
        "pieces: 3/5, 12 s left  note 1",
        "pieces: 5/5, 0 s left  note 3",
        "Error: too bad",
    ]


def test_json_is_an_object_a_line(clock, capsys):
    set_style("json", errors_as_json=True)
    work(clock)
    said = capsys.readouterr()
    assert said.out == ""
    lines = [json.loads(line) for line in said.err.splitlines()]
    assert all(datetime.fromisoformat(line.pop("time")).tzinfo for line in lines)
    pieces = {"event": "progress", "what": "pieces", "total": 5}
    assert lines == [
        {"event": "message", "message": "begin"},
        {**pieces, "done": 3, "seconds_left": 12.0, "note": "note 1"},
        {**pieces, "done": 5, "seconds_left": 0.0, "note": "note 3"},
        {"event": "error", "message": "too bad"},
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_quiet_tells_of_errors_alone(clock, capsys, as_json):
    set_style("quiet", errors_as_json=as_json)
    work(clock)
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    if as_json:
        assert json.loads(line)["message"] == "too bad"
    else:
        assert line == "Error: too bad"
