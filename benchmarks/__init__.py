"""Measurements of speed and memory, each against what it should be compared with."""

import dwp_pyro.cli  # noqa: F401 - first: sets how threads wait before torch reads it, as for every command
