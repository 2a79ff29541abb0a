"""`svi`: variational inference on the target cases, with a prior over kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dwp_pyro.config import RunOptions, SviConfig
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.distributions.priors import LEARNED, prior_at
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.device import TRAINS_IN_LESS, within_memory
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.models.bayesian import bayesianize
from dwp_pyro.models.blocks import kernel_sites
from dwp_pyro.pipeline.blocks import assign_blocks
from dwp_pyro.pipeline.fit_target import fit_target, load_source_network, source_networks
from dwp_pyro.pipeline.train_network import Program

__all__ = ["svi"]

_SMALLEST_BETA = 1e-6  # the KL is told of by dividing by it


def svi(config: SviConfig, options: RunOptions) -> Posterior:
    """Mean-field variational inference of the network's kernels on n target cases.

    Args:
        config: settings.
        options: where and how.

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
    folder = Path(config.prior_from)
    resolved = config.resolved()
    if config.members is None and resolved.centre == "source":
        # As many as there are, where the default is more.
        resolved = replace(resolved, members=min(resolved.members or 1, source_networks(folder)))
    config = resolved
    learned, centred, init = config.prior in LEARNED, config.centre == "source", config.init
    assert config.prior_scale is not None and config.members is not None
    scale = config.prior_scale

    def prepare(card: NetworkCard, device: torch.device, member: int) -> Program:
        kernel_prior = KernelPrior.load(folder).to(device) if learned or init == "prior" else None
        source = load_source_network(folder, card, member).to(device) if centred or init == "source" else None
        network = source if source is not None and init == "source" else card.build().to(device)
        blocks = assign_blocks(network, config.blocks)
        sites = kernel_sites(network)
        # Copies: bayesianize takes the parameters out of the network.
        centres = {site: w.detach().clone() for site, w in kernel_sites(source).items()} if source and centred else {}
        if kernel_prior is not None:
            kernel_prior = kernel_prior.at_sites(blocks, anew=config.blocks is not None)
            blocks = kernel_prior.block_names(sites)
        if kernel_prior is not None and init == "prior":
            kernel_prior.fill(sites)
        if kernel_prior is not None and learned:
            kernel_prior = kernel_prior.of_family(config.prior)
            for density in kernel_prior.blocks.values() if config.train_reverse_model else ():
                assert isinstance(density, KernelVAE)
                density.encoder.requires_grad_(True)
        priors = {
            site: prior_at(
                config.prior,
                site,
                weight,
                kernel_prior,
                centre=centres.get(site),
                scale=scale,
                particles=config.particles,
            )
            for site, weight in sites.items()
        }
        means = bayesianize(network, priors)
        guide = MeanFieldNormal(means)
        for site, mean in means.items():
            # Relative: kernels of the deepest blocks, and of trained networks, are many times smaller than others.
            guide.set_scale(site, (config.init_scale * mean.square().mean().sqrt()).expand_as(mean))
        return Program(network, guide, blocks, kernel_prior if learned else None)

    def beta(part: float) -> float:
        return max(_SMALLEST_BETA, config.beta * min(1.0, part / config.anneal if config.anneal else 1.0))

    with within_memory(str(options.out), TRAINS_IN_LESS):
        return fit_target(
            "svi",
            config,
            options,
            config.members,
            prepare,
            beta=beta,
            estimator=config.estimator,
            kernel_part=config.kernel_part,
        )
