"""`svi`: variational inference on the target cases, with a prior over kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dwp_pyro.config import RunOptions, SviConfig
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.distributions.priors import is_learned, prior_at
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.models.bayesian import bayesianize
from dwp_pyro.models.unet import kernel_sites
from dwp_pyro.pipeline.fit_target import fit_target, load_source_network
from dwp_pyro.pipeline.train_network import Program

__all__ = ["svi"]

_SMALLEST_BETA = 1e-6  # poutine.scale takes no 0


def svi(config: SviConfig, options: RunOptions) -> Posterior:
    """Mean-field variational inference of the network's kernels on n target cases.

    Args:
        config: settings.
        options: where and how.

    Raises:
        UserError: if the scans, the prior or the folder are unfit; nothing is then written.
    """
    folder = Path(config.prior_from)
    learned = is_learned(config.prior)
    config = dataclasses.replace(config, init=config.init or ("prior" if learned else "he"))
    needs_prior = learned or config.init == "prior"
    files = [folder / "prior.safetensors"] * needs_prior + [folder / "source.safetensors"] * (config.init == "source")

    def prepare(card: NetworkCard, device: torch.device) -> Program:
        kernel_prior = KernelPrior.load(folder).to(device) if needs_prior else None
        network = load_source_network(folder, card) if config.init == "source" else card.network()
        sites = kernel_sites(network.to(device))
        if config.init == "prior":
            assert kernel_prior is not None
            with torch.no_grad():
                for site, weight in sites.items():
                    weight.copy_(kernel_prior.sample_at(site, weight.shape))
        priors = {site: prior_at(config.prior, site, weight, kernel_prior) for site, weight in sites.items()}
        guide = MeanFieldNormal(bayesianize(network, priors), config.init_scale)
        return Program(network, guide, kernel_prior if learned else None)

    def beta(step: int) -> float:
        annealing = config.anneal * config.steps
        return max(_SMALLEST_BETA, config.beta * min(1.0, (step + 1) / annealing if annealing else 1.0))

    return fit_target("svi", config, options, prepare, learned_from=files, beta=beta, estimator=config.estimator)
