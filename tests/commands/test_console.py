"""Log output of the command line."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from dwp_pyro.commands.console import exit_with_error, logger, set_up_logging
from dwp_pyro.runtime.progress import progress
from tests.world import call


def work() -> None:
    logger.info("begin")
    with progress("pieces", 1) as advance:
        advance("note")
    logger.warning("odd")
    with pytest.raises(SystemExit) as caught:
        exit_with_error("too\nbad", 2)
    assert caught.value.code == 2


def test_messages_are_output_and_the_rest_is_not(capsys):
    set_up_logging("text", quiet=False)
    work()
    captured = capsys.readouterr()
    assert captured.out == "begin\n"
    assert captured.err.splitlines() == ["pieces: 1/1, 0 s left  note", "Warning: odd", "Error: too bad"]


def test_json_is_an_object_per_line(capsys):
    set_up_logging("json", quiet=False)
    work()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [json.loads(line) for line in captured.err.splitlines()]
    assert all(datetime.fromisoformat(line.pop("time")).tzinfo for line in lines)
    assert lines == [
        {"event": "message", "message": "begin"},
        {"event": "progress", "what": "pieces", "done": 1, "total": 1, "seconds_left": 0.0, "note": "note"},
        {"event": "warning", "message": "odd"},
        {"event": "error", "message": "too bad"},
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_quiet_prints_errors_alone(capsys, log_format):
    set_up_logging(log_format, quiet=True)
    work()
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line == "Error: too bad" or json.loads(line)["message"] == "too bad"


@pytest.mark.parametrize("command", [("score-prior", "prior", "--kernels", "bank"), ("merge-prior", "oslo", "lima")])
def test_a_seed_has_32_bits(command):
    result = call(*command, "--seed", 2**32)
    assert result.exit_code == 2 and "--seed" in result.output
