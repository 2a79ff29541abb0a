"""Parallel tasks: in processes of this machine, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch.distributed import is_torchelastic_launched

from dwp_pyro.runtime.cluster import map_on_cluster
from dwp_pyro.runtime.errors import ConfigError
from dwp_pyro.runtime.processes import map_in_processes

__all__ = ["Workers"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Workers:
    """Where the parts of a command run that do not depend on each other.

    Args:
        count: Number of worker processes, which share the threads of the command (OMP_NUM_THREADS).
        cluster: Address of the scheduler of a Dask cluster ("tcp://host:8786"), or its file; its workers run the tasks
            instead, and need the same paths.

    Raises:
        ConfigError: under `torchrun`, whose processes do the same task together.

    Examples:
        >>> from pathlib import Path
        >>> from dwp_pyro import RunOptions, Workers
        >>> RunOptions(Path("runs/mine"), workers=Workers(2)).workers.count
        2
    """

    count: int = 1
    cluster: str | None = None

    def __post_init__(self) -> None:
        if is_torchelastic_launched():
            raise ConfigError(
                "workers, cluster: torchrun starts processes of its own; omit --workers and --cluster, or start the "
                "command without torchrun"
            )

    def at_most(self, count: int) -> Workers:
        """Return no more processes than `count`, so that these use all threads."""
        return replace(self, count=min(self.count, max(1, count)))

    def map(
        self, work: Callable[[_Task], _Result], tasks: Sequence[_Task], finished: Callable[[_Task, _Result], None]
    ) -> None:
        """Run tasks; arguments and errors as of `map_in_processes` and `map_on_cluster`."""
        if self.cluster is None:
            map_in_processes(work, tasks, self.count, finished)
        else:
            map_on_cluster(work, tasks, self.cluster, finished)
