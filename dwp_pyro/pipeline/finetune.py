"""`finetune`: the deterministic arms UNet-RI, UNet-PR and UNet-PRf."""

from __future__ import annotations

from pathlib import Path

import torch

from dwp_pyro.config import FinetuneConfig, RunOptions
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.pipeline.fit_target import fit_target, load_source_network
from dwp_pyro.pipeline.train_network import Program

__all__ = ["finetune"]

# The first block, and the last.
_ENDS = ("input.", "down1.", "up3.", "output.")


def finetune(config: FinetuneConfig, options: RunOptions) -> Posterior:
    """Train a deterministic network on n target cases: same network, loss, data and budget as `svi`.

    From a random start (UNet-RI), or from the source network, the whole of it (UNet-PR) or its first
    and last block alone (UNet-PRf); Kuzina et al. 2019, section 4.

    Args:
        config: settings.
        options: where and how.

    Raises:
        UserError: if the scans, the source network or the folder are unfit; nothing is then written.
    """

    def prepare(card: NetworkCard, device: torch.device) -> Program:
        network = card.network()
        if config.init == "source":
            network = load_source_network(Path(config.prior_from), card)
        if config.train == "ends":
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith(_ENDS))
        return Program(network.to(device))

    files = [Path(config.prior_from) / "source.safetensors"] * (config.init == "source")
    return fit_target("finetune", config, options, prepare, learned_from=files)
