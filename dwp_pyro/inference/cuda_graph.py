"""A step on a GPU as CUDA graphs: recorded once, then replayed in one call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO

__all__ = ["Recorded", "RecordedLoss"]

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
            self._called = True
            return self._function()
        if self._graph is None:
            gc.collect()  # a cycle may hold nodes of autograd that belong to the stream of the first call
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                self._result = self._function()
            self._graph = graph
        self._graph.replay()
        return self._result


class RecordedLoss:
    """−ELBO and its gradients, recorded: for SVI in the place of `elbo.loss_and_grads`.

    Args:
        elbo: whose `beta`, if it ever changes, is a tensor on the GPU.
        parameters: that have gradients, on a GPU; who takes the step sets them to None, as `FiniteSteps` does.

    Raises:
        ValueError: if a batch has other shapes than the first.
    """

    def __init__(self, elbo: BatchedMeanFieldELBO, parameters: Iterable[nn.Parameter]) -> None:
        self._elbo = elbo
        self._parameters = list(parameters)
        self._batch: list[Tensor] = []
        self._recorded: Recorded[tuple[Tensor, list[Tensor | None]]] | None = None

    def __call__(self, model: Any, guide: Any, *batch: Tensor) -> Tensor:
        if self._recorded is None:
            self._batch = [part.clone() for part in batch]
            self._recorded = Recorded(partial(self._loss_and_gradients, model, guide), self._parameters[0].device)
        if [part.shape for part in batch] != [part.shape for part in self._batch]:
            raise ValueError("a recorded loss needs batches of one shape")
        for place, part in zip(self._batch, batch, strict=True):
            place.copy_(part)
        loss, gradients = self._recorded()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _loss_and_gradients(self, model: Any, guide: Any) -> tuple[Tensor, list[Tensor | None]]:
        loss = self._elbo.differentiable_loss(model, guide, *self._batch)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in self._parameters]
