"""`svi`: variational inference on the target cases, with a prior over kernels."""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.names import LEARNED
from dwp_pyro.config.training import SviConfig
from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.priors.blocks import assign_blocks, kernel_sites
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.make_prior import fixed_spread, make_prior
from dwp_pyro.priors.prior_scales import PriorScales
from dwp_pyro.runtime.device import catch_out_of_memory
from dwp_pyro.runtime.errors import ConfigError
from dwp_pyro.training.network_training import TrainingSetup
from dwp_pyro.training.source_networks import load_source_network, load_source_networks
from dwp_pyro.training.target import Method, train_target

__all__ = ["annealed", "gaussian_prior", "svi"]

_MIN_BETA = 1e-6

#: Precision of the Gaussian that keeps weights without a sample site near their start, by the kind of start. They are
#: of the order of 1: with a standard deviation of 0.1, those of a source network adapt without replacing the kernels.
_DETERMINISTIC_PRECISION = {"source": 100.0, "other": 1.0}

#: Mode c₀ of the width of a prior around a source network, relative to the size of its kernels: the best of 0.1, 0.3
#: and 0.7 by the ELBO on gliomas (studies/inference/README.md).
_CENTERED_SCALE = 0.1


def svi(config: SviConfig, options: RunOptions) -> Posterior:
    """Mean-field variational inference of the network's kernels on n target cases.

    Args:
        config: Settings.
        options: Output folder, device, and how to treat an existing run.

    Raises:
        UserError: if the scans, the prior or the folder are invalid, before anything is written.

    Examples:
        With the prior of `fit_prior`'s example, and five scans of `data/brats`:

        >>> from pathlib import Path
        >>> from dwp_pyro import RunOptions, SviConfig, svi
        >>> config = SviConfig(
        ...     root="data/brats", widths=(2, 3, 4, 5), patch=16, steps=2, n=5, validation=1, members=1
        ... )
        >>> posterior = svi(config, RunOptions(Path("runs/svi")))
        >>> len(posterior.members), posterior.network_config.regions
        (1, ('whole',))
    """
    config = config.resolve_prior()
    resolved = config.resolve()
    members = resolved.members
    assert members is not None
    if config.members is None and resolved.center == "source":
        members = min(members, len(load_source_networks(config.prior_folder).members))
        resolved = replace(resolved, members=members)
    with catch_out_of_memory(str(options.out)):
        method = Method(
            command="svi",
            config=resolved,
            members=members,
            make_setup=partial(_make_setup, resolved),
            make_nulls=partial(_make_nulls, resolved),
            beta=partial(annealed, resolved),
            evidence=resolved.evidence,
            estimator=resolved.estimator,
        )
        return train_target(method, options)


def gaussian_prior(config: SviConfig, network_config: NetworkConfig) -> Posterior:
    """Return the prior of a run of `svi` as a posterior of one member: the start that sites share.

    Its kernels have the mean and the covariance of the prior, its other weights are those of the source network.

    Args:
        config: Settings of the run, with an isotropic or Gaussian prior around the source network, of a fixed scale.
        network_config: Network of the run.

    Raises:
        ConfigError: If the prior is of another kind.
        UserError: If the folder of the prior holds no such prior or source network.
    """
    resolved = config.resolve()
    if (
        resolved.prior not in ("isotropic", "gaussian")
        or (resolved.center, resolved.init) != ("source", "source")
        or resolved.prior_scale is None
    ):
        raise ConfigError(
            "prior: sites share an isotropic or gaussian prior with center and init 'source' and a fixed prior-scale"
        )
    network, kernel_prior, _, centers = _start(resolved, network_config, torch.device("cpu"), 0)
    assert kernel_prior is not None
    kernel_prior = kernel_prior.as_family(resolved.prior)
    config_of_unit = replace(resolved, estimator="weight-sample")  # the prior's own covariance
    units = {site: _unit(config_of_unit, site, center, kernel_prior) for site, center in centers.items()}
    guide = MeanFieldNormal(centers, resolved.prior_scale, units)
    return Posterior(network_config, [Member(network, guide)])


def annealed(config: SviConfig, fraction: float) -> float:
    """Return the weight of the KL term at a fraction of the steps, above 0 to 1."""
    return max(_MIN_BETA, min(1.0, fraction / config.anneal if config.anneal else 1.0))


def _make_nulls(
    config: SviConfig, network_config: NetworkConfig, device: torch.device, member: int, fitted: TrainingSetup
) -> dict[str, TrainingSetup]:
    """Return the setups of a fitted member's null models: kernels at their start, or drawn from the fitted prior.

    The modules of the fitted prior are frozen.
    """
    if config.prior == "log-uniform":  # it cannot be sampled, and its KL is known up to a constant only
        return {}
    frozen = _start(config, network_config, device, member)[0]
    drawn = deepcopy(frozen)  # ELBOs compare only from the same start of the other weights
    for weight in kernel_sites(frozen).values():
        weight.requires_grad_(False)
    for module in fitted.prior_modules.values():
        module.requires_grad_(False)
    bayesianize(drawn, fitted.priors)
    return {"frozen": TrainingSetup(frozen, l2_sp=fitted.l2_sp), "prior": fitted._replace(network=drawn, guide=None)}


def _make_setup(config: SviConfig, network_config: NetworkConfig, device: torch.device, member: int) -> TrainingSetup:
    """Return the setup of a member, from resolved settings."""
    network, kernel_prior, blocks, centers = _start(config, network_config, device, member)
    sites = kernel_sites(network)
    l2_sp = _DETERMINISTIC_PRECISION["source" if config.init == "source" else "other"]
    scales: PriorScales | None = None
    centered, learned = config.center == "source", config.prior in LEARNED
    prior_modules: dict[str, nn.Module] = {}
    if kernel_prior is not None and learned:
        kernel_prior = kernel_prior.as_family(config.prior)
        for density in kernel_prior.blocks.values() if config.train_reverse_model else ():
            assert isinstance(density, KernelVAE)
            density.encoder.requires_grad_(True)
        prior_modules["kernel_prior"] = kernel_prior
        if config.prior_scale is None:
            weights: Counter[str] = Counter()
            for site, weight in sites.items():
                weights[blocks[site]] += weight.numel()
            scales = PriorScales(weights, _prior_width(config, centered))
            prior_modules["scales"] = scales

    def prior(site: str, weight: Tensor) -> TorchDistribution:
        return make_prior(
            config.prior,
            site,
            weight,
            kernel_prior,
            center=centers.get(site),
            scale=scales.scale(blocks[site]) if scales is not None else config.prior_scale or 1.0,
            particles=config.particles,
        )

    priors = {site: partial(prior, site, weight.detach()) for site, weight in sites.items()}
    means = bayesianize(network, priors)
    units = {site: _unit(config, site, mean, kernel_prior) for site, mean in means.items()}
    # A start wider than the prior would let noise move the means far away before the scales have shrunk.
    width = _prior_width(config, centered) if learned else math.inf
    guide = MeanFieldNormal(means, min(config.init_scale, width), units)
    return TrainingSetup(network, guide, blocks, priors, prior_modules, l2_sp)


def _start(
    config: SviConfig, network_config: NetworkConfig, device: torch.device, member: int
) -> tuple[nn.Module, KernelPrior | None, dict[str, str], dict[str, Tensor]]:
    """Return a plain network at its start, and what its priors are made of.

    Returns:
        The network; the learned prior, assigned to its sites (None if it is not used); site → prior block; and site →
        center of its prior (empty without a source network at the center).
    """
    folder = config.prior_folder
    kernel_prior = source = None
    if config.prior in LEARNED or config.init == "prior":
        kernel_prior = KernelPrior.load(folder).to(device)
    if "source" in (config.center, config.init):
        source = load_source_network(folder, network_config, member).to(device)
    network = source if source is not None and config.init == "source" else network_config.build().to(device)
    sites = kernel_sites(network)
    blocks = assign_blocks(network, config.blocks)
    centers = {}
    if source is not None and config.center == "source":
        # Copies, because bayesianize takes the parameters out of the network.
        centers = {site: weight.detach().clone() for site, weight in kernel_sites(source).items()}
    if kernel_prior is not None:
        kernel_prior = kernel_prior.assign_sites(blocks, override=config.blocks is not None)
        blocks = {site: kernel_prior.block_name(site) for site in sites}
        if config.init == "prior":
            kernel_prior.fill(sites)
    elif config.prior in ("normal", "he") and config.init == "random" and config.center == "none":
        # As large as the prior's kernels: norms cancel their size, which would otherwise cost six nats per weight.
        with torch.no_grad():
            for weight in sites.values():
                spread = (config.prior_scale or 1.0) * fixed_spread(config.prior, weight)
                weight.mul_(spread / weight.square().mean().sqrt())
    return network, kernel_prior, blocks, centers


def _prior_width(config: SviConfig, centered: bool) -> float:
    """Return the width of a learned prior, or its initial value, relative to the size of its kernels."""
    return config.prior_scale or (_CENTERED_SCALE if centered else 1.0)


def _unit(config: SviConfig, site: str, mean: Tensor, kernel_prior: KernelPrior | None) -> Tensor:
    """Return the posterior's unit at a site: a root of the prior's covariance, or the size of the site's kernels."""
    if config.prior not in LEARNED or kernel_prior is None:
        return mean.square().mean().sqrt()
    density = kernel_prior.block_at(site, mean.shape)
    if config.prior == "isotropic":
        return density.root_mean_square()
    root = density.scale_tril
    # Local reparameterization needs independent weights.
    return root.square().sum(-1).sqrt() if config.estimator == "local" else root
