"""What a GPU does, recorded once and then replayed in one call."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

__all__ = ["Recorded", "step_recordably"]

T = TypeVar("T")


class Recorded(Generic[T]):
    """A function without arguments whose kernels on a GPU are recorded at its second call, and from then on replayed.

    A step of inference starts up to two thousand kernels, which takes a processor longer than a GPU needs to run them
    (docs/performance.md). Its first call is the function's own, for what is made once and then kept.

    What it reads must lie where it lay, and not be a number of Python's; what it returns is written over by the next
    call. It must not wait for the GPU. The seed of PyTorch's generator counts at every call.

    Args:
        function: of the kernels.
        device: a GPU.
    """

    def __init__(self, function: Callable[[], T], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> T:
        if not self._called:
            result = self._function()
            self._called = True
            return result
        if self._graph is None:
            gc.collect()  # a cycle may hold nodes of autograd that belong to the stream of the first call
            graph = torch.cuda.CUDAGraph()
            # A stream of this device, for PyTorch has one for all of them; other threads may go on: one pins batches.
            stream = torch.cuda.Stream(self._device)
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._result = self._function()
            self._graph = graph
        self._graph.replay()
        return self._result


def step_recordably(optimizer: torch.optim.Optimizer) -> None:
    """Take an optimiser's step on a GPU, while it is recorded too."""
    for group in optimizer.param_groups:
        # Only while it is, for otherwise a capturable optimiser warns.
        group["capturable"] = torch.cuda.is_current_stream_capturing()
    optimizer.step()
