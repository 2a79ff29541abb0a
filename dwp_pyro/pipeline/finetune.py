"""`finetune`: the deterministic arms UNet-RI, UNet-PR, UNet-PRf and L2-SP."""

from __future__ import annotations

from pathlib import Path

import torch

from dwp_pyro.config import FinetuneConfig, RunOptions
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.inference.device import TRAINS_IN_LESS, within_memory
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.models.blocks import kernel_sites
from dwp_pyro.models.networks import NETWORKS
from dwp_pyro.pipeline.blocks import assign_blocks
from dwp_pyro.pipeline.fit_target import fit_target, load_source_network
from dwp_pyro.pipeline.train_network import Program

__all__ = ["finetune"]


def finetune(config: FinetuneConfig, options: RunOptions) -> Posterior:
    """Train a deterministic network on n target cases: same network, loss and data as `svi`.

    From a random start (UNet-RI) or from draws of the kernel prior; or from the source network, the whole of it
    (UNet-PR), its first and last block alone (UNet-PRf; Kuzina et al. 2019, section 4), or the whole under
    a pull back to the source weights (L2-SP; Li et al. 2018, eq. 3, on the output layer too).

    Args:
        config: settings.
        options: where and how.

    Raises:
        UserError: if the scans, the source network or the folder are unfit; nothing is then written.
    """

    folder = Path(config.prior_from)

    def prepare(card: NetworkCard, device: torch.device, member: int) -> Program:
        network = load_source_network(folder, card, member) if config.init == "source" else card.build()
        if config.init == "prior":
            blocks = assign_blocks(network, config.blocks)
            prior = KernelPrior.load(folder).at_sites(blocks, anew=config.blocks is not None)
            prior.fill(kernel_sites(network))
        if config.train == "ends":
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith(NETWORKS[card.network].ends))
        return Program(network.to(device), l2_sp=config.l2_sp)

    with within_memory(str(options.out), TRAINS_IN_LESS):
        return fit_target("finetune", config, options, config.members or 1, prepare)
