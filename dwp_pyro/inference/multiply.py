"""The product of the posteriors of several sites, without their scans."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields

import torch

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.runtime.errors import RunError

__all__ = ["multiply_posteriors"]


@torch.no_grad()
def multiply_posteriors(posteriors: Mapping[str, Posterior], prior: Posterior) -> Posterior:
    """Multiply the mean-field posteriors that K sites inferred under one Gaussian prior.

    The cases of the sites are independent given the weights. With q_k(W) ∝ p(W) p(D_k | W) at each site, the posterior
    of all cases is q(W) ∝ p(W)^(1 − K) Π_k q_k(W): the Bayesian committee machine (Tresp 2000), or the first step of
    synchronous partitioned variational inference (Bui et al. 2018). In the coordinates v of `MeanFieldNormal`,
    w = m₀ + A v, the prior is N(μ₀, 1/Λ₀) and the posterior of a site is N(μ_k, 1/Λ_k) for each weight, and

        Λ = Σ_k Λ_k − (K − 1) Λ₀,    μ = Λ⁻¹ (Σ_k Λ_k μ_k − (K − 1) Λ₀ μ₀).

    The product is exact if the q_k are. It counts each site's cases and, once, the prior.

    A posterior that is wider than the prior counts as wide as the prior. Where a likelihood is not log-concave, Λ_k can
    be below Λ₀, and Λ could be negative. Weights of which no site has learned more than their prior, Λ_k = Λ₀, get the
    sum of the sites' shifts, and with it their noise, which grows as √K.

    Weights without a sample site have no posterior; each gets its mean over the sites, as in federated averaging
    (McMahan et al. 2017): the same product if the Λ_k are equal and much larger than the precision of their prior.

    Args:
        posteriors: Site → its posterior, with one Bayesian member. The file of a posterior does not hold its prior; the
            units A tell other kernel covariances apart, but no other center or scale.
        prior: The prior of all sites, as `gaussian_prior` returns it.

    Returns:
        The product, with the network config of the prior and a threshold of one half.

    Raises:
        RunError: If a posterior is a mixture or deterministic, or differs from the prior in network, sites or units; if
            there is none.
    """
    if not posteriors:
        raise RunError("posteriors: there is none to multiply; give those of the sites")
    network, prior_guide = _bayesian_member("prior", prior)
    members = {name: _bayesian_member(name, posterior) for name, posterior in posteriors.items()}
    for name, (_, guide) in members.items():
        _check_alike(name, posteriors[name].network_config, guide, prior.network_config, prior_guide)
    guides = [guide for _, guide in members.values()]
    product = copy.deepcopy(prior_guide)
    for site, prior_mean in prior_guide.means().items():
        prior_precision = prior_guide.scale(site) ** -2
        precisions = [torch.maximum(guide.scale(site) ** -2, prior_precision) for guide in guides]
        weighted = [
            precision * prior_guide.whiten(site, guide.means()[site])
            for precision, guide in zip(precisions, guides, strict=True)
        ]
        surplus = (len(guides) - 1) * prior_precision
        precision = sum(precisions) - surplus
        product.set_shift(site, (sum(weighted) - surplus * prior_guide.whiten(site, prior_mean)) / precision)
        product.set_scale(site, precision.rsqrt())
    average = copy.deepcopy(network)
    states = [of_site.state_dict() for of_site, _ in members.values()]
    average.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return Posterior(prior.network_config, [Member(average, product)])


def _bayesian_member(name: str, posterior: Posterior) -> tuple[torch.nn.Module, MeanFieldNormal]:
    if len(posterior.members) != 1 or posterior.members[0].guide is None:
        kind = "a mixture" if len(posterior.members) > 1 else "deterministic"
        raise RunError(f"{name}: is {kind}; multiply posteriors of 'svi' with one member")
    return posterior.members[0].network, posterior.members[0].guide


def _check_alike(
    name: str, config: NetworkConfig, guide: MeanFieldNormal, expected: NetworkConfig, prior_guide: MeanFieldNormal
) -> None:
    """Raise RunError unless a posterior has the network, the sites and the units of the prior."""
    # The scans of a site may have another layout, other label values and another patch.
    for field in fields(NetworkConfig):
        found, needed = getattr(config, field.name), getattr(expected, field.name)
        if field.name not in ("layout", "values", "patch") and found != needed:
            raise RunError(f"{name}: its network has {field.name} {found}, the prior's {needed}; train all sites alike")
    if guide.sites != prior_guide.sites:
        raise RunError(f"{name}: has the sites {guide.sites}, the prior {prior_guide.sites}")
    for site in guide.sites:
        unit, prior_unit = guide.unit(site), prior_guide.unit(site)
        if unit.shape != prior_unit.shape:
            raise RunError(
                f"{name}: its unit at '{site}' has shape {list(unit.shape)}, the prior's {list(prior_unit.shape)}; "
                "train all sites with the prior's family and --estimator weight-sample"
            )
        if not torch.allclose(unit, prior_unit, rtol=1e-4, atol=0):
            raise RunError(
                f"{name}: was trained under another prior, because its unit at '{site}' differs from the prior's; "
                "train all sites under the same prior"
            )
