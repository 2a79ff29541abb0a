"""Fixtures of the command tests."""

from tests.commands.conftest import command, copy_of_world, world

__all__ = ["command", "copy_of_world", "world"]
