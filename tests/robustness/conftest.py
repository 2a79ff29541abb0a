"""The world of whole commands serves here too."""

from tests.commands.conftest import command, copy_of_world, world

__all__ = ["command", "copy_of_world", "world"]
