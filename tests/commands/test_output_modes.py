"""Progress output of the command line, and shell completion."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dwp_pyro.cli import main


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (("--log-format", "json"), {}),
        ((), {"DWP_PYRO_LOG_FORMAT": "json"}),
        (("--quiet",), {}),
        ((), {"DWP_PYRO_QUIET": "1"}),
        (("--quiet", "--log-format", "json"), {}),
        ((), {}),
    ],
)
def test_an_option_or_a_variable_selects_the_output_mode(tmp_path, options, environment):
    """All modes print the same result, and all print errors."""
    runner = CliRunner(env=environment)
    selected = {**environment, **dict(zip(options, options, strict=True))}
    quiet, as_json = any("quiet" in name.lower() for name in selected), "json" in selected.values()
    arguments = ["phantom", "ms", str(tmp_path / "scans"), "--cases", "1"]
    written = runner.invoke(main, [*options, *arguments])
    assert written.exit_code == 0, written.output
    assert written.stdout == f"1 case in {tmp_path / 'scans'}: patient01 to patient01\n"
    failed = runner.invoke(main, [*options, *arguments])
    assert failed.exit_code == 2
    if as_json:
        assert [json.loads(line)["event"] for line in failed.stderr.splitlines()] == ["error"]
        assert [json.loads(line)["event"] for line in written.stderr.splitlines()] == ["progress"] * (not quiet)
    else:
        assert failed.stderr.startswith("Error: ") and len(failed.stderr.splitlines()) == 1
        assert written.stderr == ("" if quiet else "ms scans: 1/1, 0 s left\n")


@pytest.mark.parametrize("arguments", [["svi", "--n", "five"], ["no-such-command"]])
def test_usage_errors_can_be_json(arguments):
    result = CliRunner().invoke(main, ["--log-format", "json", *arguments])
    assert result.exit_code == 2
    assert [json.loads(line)["event"] for line in result.stderr.splitlines()] == ["error"]
    assert "Usage:" in CliRunner().invoke(main, ["svi", "--n", "five"]).stderr


@pytest.mark.parametrize(
    ("line", "completion"),
    [("dwp-pyro fit", "fit-prior"), ("dwp-pyro svi --pri", "--prior"), ("dwp-pyro svi --prior gau", "gaussian")],
)
def test_bash_completes_commands_options_and_choices(line, completion):
    shell = {"_DWP_PYRO_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    result = CliRunner(env=shell).invoke(main, prog_name="dwp-pyro")
    assert f"plain,{completion}" in result.output.splitlines()
