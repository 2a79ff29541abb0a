"""Remedies name options that the command has."""

from __future__ import annotations

import re

import pytest

from dwp_pyro.cli import main
from dwp_pyro.commands import hints
from dwp_pyro.commands.hints import hint
from dwp_pyro.runtime import errors

OPTIONS = {name: {option for p in command.params for option in p.opts} for name, command in main.commands.items()}


@pytest.mark.parametrize("kind", hints._HINTS)
def test_a_remedy_fits_the_command(kind):
    """Every remedy serves some command; none names an option that the command lacks."""
    remedies = {hint(kind("x"), options) for options in OPTIONS.values()}
    assert set(hints._HINTS[kind]) <= remedies
    for options in OPTIONS.values():
        remedy = re.sub(r"'[^']*'", "", hint(kind("x"), options))
        assert set(re.findall(r"--[a-z-]+", remedy)) <= options


@pytest.mark.parametrize("kind", hints._HINTS)
def test_a_quoted_command_has_its_quoted_options(kind):
    for remedy in hints._HINTS[kind]:
        for quoted in re.findall(r"'([^']*)'", remedy):
            command, *words = quoted.removeprefix("dwp-pyro ").split()
            assert {word for word in words if word.startswith("--")} <= OPTIONS[command]


def test_remedies_that_do_not_apply_are_omitted():
    assert hint(errors.RunError("x"), OPTIONS["svi"]) == ""
    assert "--patch" not in hint(errors.OutOfMemory("x"), OPTIONS["predict"])
    assert "--prior-scale" not in hint(errors.Diverged("x"), OPTIONS["finetune"])
