"""Pyro's SVI with one optimizer: on a CPU, as CUDA graphs, or in several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.runtime.cuda_graph import GraphedCallable
from dwp_pyro.runtime.distributed import average, process_count
from dwp_pyro.runtime.non_finite_guard import NonFiniteGuard

__all__ = ["GraphedLoss", "OneOptimizer", "adamw", "guide_function", "pyro_svi"]

#: The Fisher information of a log standard deviation is 2, so its gradients have a natural unit. Far below 1 they are
#: noise, which Adam would otherwise amplify to steps of the full rate.
_SCALE_EPS = 1.0
#: Squared gradients are averaged over 20 steps instead of 1,000: those of the first steps are orders of magnitude
#: larger, whatever the initial scale, and would slow down all later steps.
_GUIDE_BETAS = (0.9, 0.95)


def adamw(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, rates: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """Return AdamW with groups for deterministic weights (with weight decay), means, log-scales, and the rest."""
    settings: dict[str, dict[str, Any]] = {
        "network.": {"lr": rates[0], "weight_decay": weight_decay},
        "guide.shifts.": {"lr": rates[1], "betas": _GUIDE_BETAS},
        "guide.log_scales.": {"lr": rates[2], "betas": _GUIDE_BETAS, "eps": _SCALE_EPS},
        "prior_modules.scales.": {"lr": rates[2], "betas": _GUIDE_BETAS, "eps": _SCALE_EPS},
        "": {"lr": rates[0]},
    }
    remaining = dict(parameters)
    groups = []
    for prefix, setting in settings.items():
        members = [remaining.pop(name) for name in list(remaining) if name.startswith(prefix)]
        groups.append({"params": members, "weight_decay": 0.0, **setting})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rates[0], fused=True)


class OneOptimizer(PyroOptim):
    """Step one torch optimizer over all parameters in `SVI`, instead of one per tensor, so that its state can be saved.

    The set of parameters that SVI passes is unordered and ignored. The last terms of the ELBO tell whether the loss is
    finite.
    """

    def __init__(self, take_step: NonFiniteGuard, elbo: MeanFieldELBO) -> None:
        self.take_step = take_step
        self.elbo = elbo

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.take_step(torch.as_tensor(sum(self.elbo.terms.values())))


class GraphedLoss:
    """−ELBO and its gradients as a CUDA graph, in place of `elbo.loss_and_grads`.

    Args:
        elbo: ELBO; a `beta` that changes must be a tensor on the GPU.
        parameters: Parameters on a GPU; their gradients must be set to None after each step, as `NonFiniteGuard` does.

    Raises:
        ValueError: if a batch has other shapes than the first.
    """

    def __init__(self, elbo: MeanFieldELBO, parameters: Sequence[nn.Parameter]) -> None:
        self.elbo = elbo
        self.parameters = parameters
        self._batch: list[Tensor] = []
        self._graphed: GraphedCallable[tuple[Tensor, dict[str, Tensor], list[Tensor | None]]] | None = None

    def __call__(self, model: Any, guide: Any, *batch: Tensor) -> Tensor:
        """Return the loss and set the gradients; model and guide must be those of the first call."""
        if self._graphed is None:
            self._batch = [torch.empty_like(part) for part in batch]
            function = partial(_loss_and_grads, self.elbo, self.parameters, model, guide, self._batch)
            self._graphed = GraphedCallable(function, self.parameters[0].device)
        if [part.shape for part in batch] != [part.shape for part in self._batch]:
            raise ValueError("a graphed loss needs batches of one shape")
        for place, part in zip(self._batch, batch, strict=True):
            place.copy_(part)
        loss, self.elbo.terms, gradients = self._graphed()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss


# Not a method: a reference cycle would keep a graph's memory until garbage collection.
def _loss_and_grads(
    elbo: MeanFieldELBO, parameters: Sequence[nn.Parameter], model: Any, guide: Any, batch: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    loss = elbo.differentiable_loss(model, guide, *batch)
    loss.backward()
    return loss.detach(), elbo.terms, [parameter.grad for parameter in parameters]


class _DistributedLoss(nn.Module):
    """−ELBO and its gradients, means over the processes of the run, in place of `elbo.loss_and_grads`."""

    def __init__(self, elbo: MeanFieldELBO, model: SegmentationModel, guide: MeanFieldNormal | None) -> None:
        super().__init__()
        self.elbo = elbo
        self.model = model
        self.guide = guide

    def forward(self, *batch: Tensor) -> Tensor:
        return self.elbo.differentiable_loss(self.model, guide_function(self.guide), *batch)

    def averaged(self) -> Callable[..., Tensor]:
        """Return the function that SVI calls. DDP starts with the parameters of process 0 and averages gradients."""
        parallel = DistributedDataParallel(self)

        def loss_and_grads(model: Any, guide: Any, *batch: Tensor) -> Tensor:
            loss: Tensor = parallel(*batch)
            loss.backward()
            means = average({"loss": loss.detach(), **self.elbo.terms})
            loss, self.elbo.terms = means.pop("loss"), means
            return loss

        return loss_and_grads


def guide_function(guide: MeanFieldNormal | None) -> Callable[..., Any]:
    """Return the function that SVI calls as the guide; without a guide it samples nothing."""
    # Calling the guide itself would register each of its parameters with Pyro at each step.
    return (lambda *batch: {}) if guide is None else guide.forward


def pyro_svi(
    model: SegmentationModel, guide: MeanFieldNormal | None, guard: NonFiniteGuard, elbo: MeanFieldELBO
) -> SVI:
    """Return Pyro's SVI with one optimizer for all parameters.

    With several processes, gradients are averaged; with one on a GPU, loss, gradients and step are CUDA graphs.
    """
    arguments: tuple[Any, Any, OneOptimizer] = (model, guide_function(guide), OneOptimizer(guard, elbo))
    if process_count() > 1:
        return SVI(*arguments, elbo.loss, _DistributedLoss(elbo, model, guide).averaged())
    if guard.parameters[0].device.type != "cuda":
        return SVI(*arguments, elbo)
    guard.capture()
    return SVI(*arguments, elbo.loss, GraphedLoss(elbo, guard.parameters))
