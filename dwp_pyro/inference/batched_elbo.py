"""The mean-field ELBO with one batch a prior."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
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
from dwp_pyro.distributions.summed_divergence import chunked_sum, kernel_changes, summed_divergence, summed_entropy

__all__ = ["BatchedMeanFieldELBO"]


class BatchedMeanFieldELBO(Trace_ELBO):
    """E_q log p(y|W) − β Σ KL(q‖p), the estimate of `TraceMeanField_ELBO` at a fraction of its cost.

    The stock estimator goes from site to site and evaluates each latent site's log-density besides its
    divergence. Here the kernels of all sites under one `DeepWeightPrior` are one batch, and their bound
    is taken at the weights that the guide drew; other pairs use their registered divergence. The mean is
    the same, and the guide must be fully reparameterised Normals.

    After each evaluation `terms` holds its two parts in nats, [] each: `log_likelihood`, and `divergence` with its
    scale.

    Args:
        kernel_part: part of the kernels, above 0 and at most 1, drawn anew each time and scaled up to all, at which a
            density without closed form is taken: the mean stays, the cost falls, the variance grows.
        beta: β, the weight of the divergence, 1 for Bayes; it may change from one evaluation to the next. A tensor, [],
            where evaluations are recorded.
    """

    def __init__(self, kernel_part: float = 1.0, beta: float | Tensor = 1.0) -> None:
        super().__init__()
        self.kernel_part = kernel_part
        self.beta = beta
        self.terms: dict[str, Tensor] = {}

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
        divergences: dict[Any, list[Tensor]] = defaultdict(list)  # by their scale
        pairs: dict[Any, list[tuple[Any, Any]]] = defaultdict(list)
        batches: dict[tuple[int, int, float, float], list[tuple[DeepWeightPrior, Any]]] = defaultdict(list)
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                log_likelihood = log_likelihood + site["log_prob_sum"]
                continue
            guide_site = guide_trace.nodes[name]
            prior = site["fn"].base_dist if isinstance(site["fn"], Independent) else site["fn"]
            if guide_site["mask"] is not None:
                kl = kl_divergence(guide_site["fn"], site["fn"])
                divergences[1.0].append(scale_and_mask(kl, guide_site["scale"], guide_site["mask"]).sum())
            elif isinstance(prior, DeepWeightPrior) and not isinstance(prior.density, KernelGaussian):
                key = (id(prior.density), prior.particles, prior.scale, float(guide_site["scale"]))
                batches[key].append((prior, guide_site))
            else:
                pairs[guide_site["scale"]].append((guide_site["fn"], site["fn"]))
        for scale, sites in pairs.items():
            divergences[scale].append(summed_divergence(sites))
        for (*_, scale), members in batches.items():
            divergences[scale].append(_bound_divergence(members, self.kernel_part))
        divergence: Any = self.beta * sum(scale * torch.stack(terms).sum() for scale, terms in divergences.items())
        # Not read here: a GPU would stand still until the backward pass is on its way.
        parts = {"log_likelihood": log_likelihood, "divergence": divergence}
        self.terms = {name: torch.as_tensor(part).detach() for name, part in parts.items()}
        loss = divergence - log_likelihood
        return loss, loss


def _bound_divergence(members: list[tuple[DeepWeightPrior, Any]], part: float) -> Tensor:
    """Σ [−H[q] − E_q log p(w)] over the kernels of all sites that share a density and a scale, by one draw."""
    entropy = torch.stack([summed_entropy(site["fn"]) for _, site in members]).sum()
    sizes = [prior.batch_shape.numel() for prior, _ in members]
    count = math.ceil(part * sum(sizes))
    kernels, means = [], []
    for prior, site in members:
        shape = (-1, *prior.event_shape)
        kernels.append(site["value"].reshape(shape))
        means.append(prior.mean.expand(site["value"].shape).reshape(shape))
    changes = kernel_changes(kernels, means, count)
    prior = members[0][0]
    trained = [parameter for parameter in prior.density.parameters() if parameter.requires_grad]
    log_prob = chunked_sum(partial(prior.value_and_gradients, parameters=trained), changes, trained)
    return -entropy - sum(sizes) / count * log_prob
