"""Capture of GPU work as a CUDA graph, which one call replays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

__all__ = ["GraphedCallable", "capturable_step"]

T = TypeVar("T")


class GraphedCallable(Generic[T]):
    """Function without arguments that its second call captures as a CUDA graph and later calls replay.

    An inference step launches up to two thousand kernels, which takes the CPU longer than the GPU needs to run them
    (docs/performance.md). The first call runs the function eagerly, so that it can create state that it keeps.

    The function must read tensors at fixed addresses and must not synchronize with the GPU; Python numbers keep the
    values they had at capture. Each call overwrites the previous result and advances PyTorch's generator.
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
            gc.collect()  # reference cycles may hold autograd nodes of the first call's stream
            graph = torch.cuda.CUDAGraph()
            # PyTorch's default capture stream may belong to another device. The capture mode allows the pinning of
            # batches in another thread.
            stream = torch.cuda.Stream(self._device)
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._result = self._function()
            self._graph = graph
        self._graph.replay()
        return self._result


def capturable_step(optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer step on a GPU, inside or outside of a CUDA graph capture."""
    for group in optimizer.param_groups:
        # A capturable optimizer warns outside of a capture.
        group["capturable"] = torch.cuda.is_current_stream_capturing()
    optimizer.step()
