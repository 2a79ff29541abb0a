"""Documented commands exist and have the options they are given; studies are valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dwp_pyro.cli import main
from dwp_pyro.study.grid import Study

ROOT = Path(__file__).parents[1]
STUDIES = [path for path in sorted(ROOT.glob("studies/*/*.yaml")) if "archive" not in path.parts]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `dwp-pyro` command in the code blocks of a page."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("dwp-pyro "):
                yield shlex.split(line, comments=True)[1:]


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("studies/*/README.md")))
    if any(command_lines(page)) and "archive" not in page.parts
]


def test_pages_with_commands_are_found():
    assert len(PAGES) > 10 and ROOT / "README.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_options_of_documented_commands_exist(page):
    known = {option for parameter in main.params for option in parameter.opts}
    for arguments in command_lines(page):
        while arguments[0] in known:  # options of the program before the command
            arguments = arguments[1 if arguments[0] in ("--quiet", "--version") else 2 :]
        command = main.get_command(click.Context(main), arguments[0])
        assert command is not None, arguments
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        used = {argument.partition("=")[0] for argument in arguments[1:] if argument.startswith("--")}
        assert used <= options, arguments


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_studies_are_valid(path):
    assert Study.read(path).runs
