"""`finetune`: the deterministic methods UNet-RI, UNet-PR, UNet-PRf and L2-SP."""

from __future__ import annotations

from functools import partial

import torch

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import FinetuneConfig
from dwp_pyro.inference.posterior import NetworkConfig, Posterior
from dwp_pyro.models.registry import NETWORKS
from dwp_pyro.priors.blocks import assign_blocks, kernel_sites
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.runtime.device import catch_out_of_memory
from dwp_pyro.training.network_training import TrainingSetup
from dwp_pyro.training.source_networks import load_source_network
from dwp_pyro.training.target import Method, train_target

__all__ = ["finetune"]


def finetune(config: FinetuneConfig, options: RunOptions) -> Posterior:
    """Train a deterministic network on n target cases, with the network, loss and data of `svi`.

    The start is random (UNet-RI), drawn from the kernel prior, or the source network. From the source network, all
    blocks are trained (UNet-PR), the first and last alone (UNet-PRf; Kuzina et al. 2019, section 4), or all under a
    penalty on the distance to the source weights (L2-SP; Li et al. 2018, eq. 3, also on the output layer).

    Args:
        config: Settings.
        options: Output folder, device, and how to treat an existing run.

    Raises:
        UserError: if the scans, the source network or the folder are invalid, before anything is written.

    Examples:
        >>> from pathlib import Path
        >>> from dwp_pyro import FinetuneConfig, RunOptions, finetune
        >>> config = FinetuneConfig(root="data/brats", widths=(2, 3, 4, 5), patch=16, steps=2, n=5, validation=1)
        >>> posterior = finetune(config, RunOptions(Path("runs/finetune")))
        >>> posterior.members[0].guide is None
        True
    """
    config = config.resolve_prior()
    method = Method(
        command="finetune", config=config, members=config.members or 1, make_setup=partial(_make_setup, config)
    )
    with catch_out_of_memory(str(options.out)):
        return train_target(method, options)


def _make_setup(
    config: FinetuneConfig, network_config: NetworkConfig, device: torch.device, member: int
) -> TrainingSetup:
    folder = config.prior_folder
    source = config.init == "source"
    network = load_source_network(folder, network_config, member) if source else network_config.build()
    if config.init == "prior":
        blocks = assign_blocks(network, config.blocks)
        prior = KernelPrior.load(folder).assign_sites(blocks, override=config.blocks is not None)
        prior.fill(kernel_sites(network))
    if config.trainable == "first-last":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(NETWORKS[network_config.network].first_last))
    return TrainingSetup(network.to(device), l2_sp=config.l2_sp)
