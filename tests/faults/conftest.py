"""The world of whole commands serves here too."""

from tests.cli.conftest import world

__all__ = ["world"]
