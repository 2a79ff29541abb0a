"""The mean-field ELBO with one batch a prior."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from pyro.poutine import replay
from pyro.poutine import trace as record
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.distributions.kernel_density import KernelGaussian

__all__ = ["BatchedMeanFieldELBO"]


class BatchedMeanFieldELBO(Trace_ELBO):
    """E_q log p(y|W) − Σ KL(q‖p), the estimate of `TraceMeanField_ELBO` at a fraction of its cost.

    The stock estimator goes from site to site and evaluates each latent site's log-density besides its
    divergence. Here the kernels of all sites under one `DeepWeightPrior` are one batch, and their bound
    is taken at the weights that the guide drew; other pairs use their registered divergence. The mean is
    the same, and the guide must be fully reparameterised Normals.

    After each evaluation `terms` holds its two parts in nats: `log_likelihood`, and `divergence` with its scale β.

    Args:
        kernel_part: part of the kernels, above 0 and at most 1, drawn anew each time and scaled up to all, at which a
            density without closed form is taken: the mean stays, the cost falls, the variance grows.
    """

    def __init__(self, kernel_part: float = 1.0) -> None:
        super().__init__()
        self.kernel_part = kernel_part
        self.terms: dict[str, float] = {}

    def _get_trace(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guide_trace = record(guide).get_trace(*args, **kwargs)
        model_trace = prune_subsample_sites(record(replay(model, trace=guide_trace)).get_trace(*args, **kwargs))
        model_trace.compute_log_prob(site_filter=lambda name, site: site["is_observed"])
        return model_trace, guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """An estimate of −ELBO, in nats, to be differentiated."""
        traces = self._get_traces(model, guide, args, kwargs)
        losses = [self._differentiable_loss_particle(*pair)[1] for pair in traces]
        return torch.stack(losses).mean()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """An estimate of −ELBO, in nats."""
        return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """An estimate of −ELBO, in nats; its gradients are added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(torch_item(loss))

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        log_likelihood: Any = 0.0
        divergence: Any = 0.0
        batches: dict[tuple[int, int, float], list[tuple[DeepWeightPrior, Any]]] = defaultdict(list)
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                log_likelihood = log_likelihood + site["log_prob_sum"]
                continue
            guide_site = guide_trace.nodes[name]
            prior = site["fn"].base_dist if isinstance(site["fn"], Independent) else site["fn"]
            if isinstance(prior, DeepWeightPrior) and guide_site["mask"] is None:
                key = (id(prior.density), prior.particles, float(guide_site["scale"]))
                batches[key].append((prior, guide_site))
            else:
                kl = kl_divergence(guide_site["fn"], site["fn"])
                divergence = divergence + scale_and_mask(kl, guide_site["scale"], guide_site["mask"]).sum()
        for (_, _, scale), members in batches.items():
            divergence = divergence + scale * _divergence(members, self.kernel_part)
        self.terms = {"log_likelihood": torch_item(log_likelihood), "divergence": torch_item(divergence)}
        loss = divergence - log_likelihood
        return torch_item(loss), loss


def _divergence(members: list[tuple[DeepWeightPrior, Any]], part: float) -> Tensor:
    """Σ [−H[q] − E_q log p(w)] over the kernels of all sites that share a density: in closed form, or one draw."""
    prior = members[0][0]
    density, shape = prior.density, prior.event_shape

    def batch(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1, *shape) for tensor in tensors])

    constant = sum(member.log_scale() * member.batch_shape.numel() for member, _ in members)
    entropy = torch.stack([site["fn"].entropy().sum() for _, site in members]).sum()
    if isinstance(density, KernelGaussian):
        normals = [(member, site["fn"].base_dist) for member, site in members]
        loc = batch(member.to_density(normal.loc) for member, normal in normals)
        scale = batch(normal.scale / member.scale for member, normal in normals)
        return constant - entropy - density.expected_log_prob(loc, scale).sum()
    kernels = batch(member.to_density(site["value"]) for member, site in members)
    total = len(kernels)
    if part < 1:
        kernels = kernels[torch.randperm(total, device=kernels.device)[: math.ceil(part * total)]]
    log_prob = density.log_prob_estimate(kernels, prior.particles).sum()
    return constant - entropy - total / len(kernels) * log_prob
