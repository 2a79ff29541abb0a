"""The mean-field ELBO of a training step."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from pyro.poutine import replay, trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from dwp_pyro.models.segmentation import LOG_PRIOR

__all__ = ["MeanFieldELBO"]


class MeanFieldELBO(Trace_ELBO):
    """E_q log p(y|W) − β Σ KL(q‖p): `TraceMeanField_ELBO` with a weight β of the KL term.

    Unlike the stock estimator, it does not evaluate the log-densities of latent sites. A site of the model that the
    guide lacks is drawn from its prior and adds no KL.

    After each evaluation `terms` holds the parts of the last particle in nats, [] each: `log_likelihood`, `kl` (without
    β), and `log_prior`, the model's factor of that name.

    Args:
        beta: β; a tensor, [], if it changes between evaluations.
        num_particles: Samples of q per evaluation.

    Raises:
        ValueError: by an evaluation, if a site of the guide is not in the model (as with `AutoNormal`), or a pair of
            distributions has no registered divergence.
    """

    def __init__(self, beta: float | Tensor = 1.0, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)  # type: ignore[no-untyped-call]
        self.beta = beta
        self.terms: dict[str, Tensor] = {}

    def _get_trace(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guide_trace = trace(guide).get_trace(*args, **kwargs)
        model_trace = prune_subsample_sites(trace(replay(model, trace=guide_trace)).get_trace(*args, **kwargs))
        model_trace.compute_log_prob(site_filter=lambda name, site: site["is_observed"])
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        unknown = [name for name in guide_trace.stochastic_nodes if name not in model_trace]
        if unknown:
            raise ValueError(f"the guide samples '{unknown[0]}', which is not a site of the model")
        log_likelihood: Any = 0.0
        log_prior: Any = 0.0
        kl: Any = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if name == LOG_PRIOR:
                log_prior = site["log_prob_sum"]
            elif site["is_observed"]:
                log_likelihood = log_likelihood + site["log_prob_sum"]
            elif name in guide_trace:
                q = guide_trace.nodes[name]
                try:
                    divergence = kl_divergence(q["fn"], site["fn"])
                except NotImplementedError as problem:
                    raise ValueError(f"no divergence is registered for the pair at '{name}': {problem}") from problem
                kl = kl + scale_and_mask(divergence, q["scale"], q["mask"]).sum()
        parts = {"log_likelihood": log_likelihood, "kl": kl, "log_prior": log_prior}
        # Tensors, not floats: reading them here would make a GPU wait before the backward pass.
        self.terms = {name: torch.as_tensor(part).detach() for name, part in parts.items()}
        loss = self.beta * kl - log_likelihood - log_prior
        return loss, loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return an estimate of −ELBO, in nats, with its graph."""
        traces = self._get_traces(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
        return torch.stack([self._differentiable_loss_particle(*pair)[0] for pair in traces]).mean()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of −ELBO, in nats."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of −ELBO, in nats, and add its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(torch_item(loss))
