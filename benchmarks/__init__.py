"""Benchmarks of speed and memory, each against a reference."""

import dwp_pyro.cli  # noqa: F401 - must precede torch: tunes threads and memory as for every command
