"""`svi`: variational inference on the target cases, with a prior over kernels."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from dwp_pyro.config import RunOptions, SviConfig
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.distributions.prior_scales import PriorScales
from dwp_pyro.distributions.priors import LEARNED, prior_at
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.device import TRAINS_IN_LESS, within_memory
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.models.bayesian import bayesianize
from dwp_pyro.models.blocks import kernel_sites
from dwp_pyro.pipeline.blocks import assign_blocks
from dwp_pyro.pipeline.fit_target import fit_target, load_source_network, source_networks
from dwp_pyro.pipeline.train_network import Program

__all__ = ["annealed", "svi"]

_MIN_BETA = 1e-6

#: Precision of the Gaussian around their start under which weights that are no sample sites are fitted, by the start.
#: They are of the order of 1: with a source network 0.1 lets them adapt and not replace the kernels.
_DETERMINISTIC_PRECISION = {"source": 100.0, "other": 1.0}

#: Mode c₀ of the width of a prior around a source network, in its kernels' sizes: the best of 0.1, 0.3 and 0.7 by the
#: ELBO on gliomas (docs/results.md).
_CENTERED_SCALE = 0.1


def svi(config: SviConfig, options: RunOptions) -> Posterior:
    """Mean-field variational inference of the network's kernels on n target cases.

    Args:
        config: Settings.
        options: Where and how to run.

    Raises:
        UserError: if the scans, the prior or the folder are unfit; nothing is then written.

    Example:
        With the prior of `fit_prior`'s example, and five scans of `data/brats`:

        >>> from pathlib import Path
        >>> from dwp_pyro import RunOptions, SviConfig, svi
        >>> config = SviConfig(
        ...     root="data/brats", widths=(2, 3, 4, 5), patch=16, steps=2, n=5, validation=1, members=1
        ... )
        >>> posterior = svi(config, RunOptions(Path("runs/svi")))
        >>> len(posterior.members), posterior.card.regions
        (1, ('whole',))
    """
    resolved = config.resolved()
    if config.members is None and resolved.centre == "source":
        # As many as there are, where the default is more.
        resolved = replace(resolved, members=min(resolved.members or 1, source_networks(Path(config.prior_from))))
    config = resolved
    assert config.members is not None

    with within_memory(str(options.out), TRAINS_IN_LESS):
        return fit_target(
            "svi",
            config,
            options,
            config.members,
            partial(_program, config),
            nulls=partial(_nulls, config),
            beta=partial(annealed, config),
            evidence=config.evidence,
            estimator=config.estimator,
        )


def annealed(config: SviConfig, fraction: float) -> float:
    """Weight of the KL term at a fraction of the steps, above 0 to 1."""
    return max(_MIN_BETA, min(1.0, fraction / config.anneal if config.anneal else 1.0))


def _nulls(
    config: SviConfig, card: NetworkCard, device: torch.device, member: int, fitted: Program
) -> dict[str, Program]:
    """Programs beside a member's, fitted: kernels stay at their start, or are drawn from its prior as that now is."""
    frozen = _program(config, card, device, member, null="frozen")
    if config.prior == "log-uniform":  # improper: nothing can be drawn from it
        return {"frozen": frozen}
    scales = copy.deepcopy(fitted.prior_modules.get("scales"))
    assert isinstance(scales, PriorScales | None)
    prior = _program(config, card, device, member, null="prior", scales=scales)
    return {"frozen": frozen, "prior": prior}


def _program(
    config: SviConfig,
    card: NetworkCard,
    device: torch.device,
    member: int,
    null: str | None = None,
    scales: PriorScales | None = None,
) -> Program:
    """What is trained: the posterior's program, or one of its nulls.

    Args:
        config: Settings, resolved.
        card: Form of the network.
        device: Device to build on.
        member: Number of the member.
        null: "frozen" for kernels that stay at their start, "prior" for kernels drawn from the prior.
        scales: Scales of the prior, fixed, for the null "prior".
    """
    folder = Path(config.prior_from)
    learned, centered = config.prior in LEARNED, config.centre == "source"
    kernel_prior = KernelPrior.load(folder).to(device) if learned or config.init == "prior" else None
    source = load_source_network(folder, card, member).to(device) if "source" in (config.centre, config.init) else None
    network = source if source is not None and config.init == "source" else card.build().to(device)
    blocks = assign_blocks(network, config.blocks)
    sites = kernel_sites(network)
    # Copies: bayesianize takes the parameters out of the network.
    centers = {site: w.detach().clone() for site, w in kernel_sites(source).items()} if source and centered else {}
    if kernel_prior is not None:
        kernel_prior = kernel_prior.at_sites(blocks, anew=config.blocks is not None)
        blocks = kernel_prior.block_names(sites)
        if config.init == "prior":
            kernel_prior.fill(sites)
    elif config.prior == "normal" and config.init == "random" and not centered:
        # As large as the prior's kernels: before a norm their size says nothing, and costs six nats a weight.
        with torch.no_grad():
            for weight in sites.values():
                weight.mul_((config.prior_scale or 1.0) / weight.square().mean().sqrt())
    l2_sp = _DETERMINISTIC_PRECISION["source" if config.init == "source" else "other"]
    if null == "frozen":
        for weight in sites.values():
            weight.requires_grad_(False)
        return Program(network, l2_sp=l2_sp)
    prior_modules: dict[str, nn.Module] = {}
    if kernel_prior is not None and learned:
        kernel_prior = kernel_prior.of_family(config.prior)
        for density in kernel_prior.blocks.values() if config.train_reverse_model and null is None else ():
            assert isinstance(density, KernelVAE)
            density.encoder.requires_grad_(True)
        prior_modules["kernel_prior"] = kernel_prior
        if scales is not None:
            prior_modules["scales"] = scales.requires_grad_(False)
        elif null is None and config.prior_scale is None:
            weights = {block: 0 for block in blocks.values()}
            for site, weight in sites.items():
                weights[blocks[site]] += weight.numel()
            prior_modules["scales"] = PriorScales(weights, _prior_width(config, centered))
    learned_scales = prior_modules.get("scales")

    def prior(site: str, weight: Tensor) -> TorchDistribution:
        scale = learned_scales.scale(blocks[site]) if isinstance(learned_scales, PriorScales) else config.prior_scale
        return prior_at(
            config.prior,
            site,
            weight,
            kernel_prior,
            centre=centers.get(site),
            scale=1.0 if scale is None else scale,
            particles=config.particles,
        )

    priors = {site: partial(prior, site, weight.detach()) for site, weight in sites.items()}
    means = bayesianize(network, priors)
    if null is not None:
        return Program(network, blocks=blocks, prior_modules=prior_modules, l2_sp=l2_sp)
    units = {site: _unit(config, site, mean, kernel_prior) for site, mean in means.items()}
    # No posterior is wider than its prior; from a wider start noise drives the means far off before it has died down.
    width = _prior_width(config, centered) if learned else math.inf
    guide = MeanFieldNormal(means, min(config.init_scale, width), units)
    return Program(network, guide, blocks, priors, prior_modules, l2_sp)


def _prior_width(config: SviConfig, centered: bool) -> float:
    """Width of a learned prior, or the start of it, in its kernels' sizes."""
    return config.prior_scale or (_CENTERED_SCALE if centered else 1.0)


def _unit(config: SviConfig, site: str, mean: Tensor, kernel_prior: KernelPrior | None) -> Tensor:
    """The unit of the posterior at a site: the root of its prior's covariance, or the size of its kernels."""
    if config.prior not in LEARNED or kernel_prior is None:
        return mean.square().mean().sqrt()
    root = kernel_prior.block_at(site, mean.shape).scale_tril
    # Local reparameterization needs independent weights.
    return root.square().sum(-1).sqrt() if config.estimator == "local" else root
