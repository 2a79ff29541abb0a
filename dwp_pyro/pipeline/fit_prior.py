"""`fit-prior`: source networks, their kernels, and a prior a block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dwp_pyro.config import FitPriorConfig, RunOptions
from dwp_pyro.distributions.kernel_prior import ANY_SITE, BlockCard, KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.errors import PriorError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.fit_kernel_vae import fit_kernel_vae
from dwp_pyro.models.unet import PRIOR_BLOCKS, in_block
from dwp_pyro.pipeline.collect_kernels import KernelBank, collect_kernels, read_kernels
from dwp_pyro.pipeline.train_source import train_source
from dwp_pyro.pipeline.training_data import load_training_data, with_defaults
from dwp_pyro.progress import progress
from dwp_pyro.report.figures import save_kernel_figure
from dwp_pyro.storage import RunFolder, file_digest
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = ["blocks_of", "fit_prior"]

_FOREIGN = "all"  # the block of kernels that came from another network


def fit_prior(config: FitPriorConfig, options: RunOptions) -> KernelPrior:
    """Learn a prior over kernels, from source scans or from kernels in a file.

    Writes into `options.out`: `prior.safetensors` and `prior.json`, `kernels.safetensors` and
    `kernels.json`, `kernels.png`, and, where networks were trained, `source.safetensors` (the best of
    them), `source/` (all of them) and the metrics.

    Args:
        config: settings.
        options: where and how.

    Returns:
        The prior, its cards holding the held-out figures.

    Raises:
        UserError: if the scans, the kernels or the folder are unfit; nothing is then written.
    """
    device = torch_device(options.device)
    if config.kernels is None:
        config = with_defaults(config)
    folder = (options.out, "fit-prior", config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    if config.kernels is not None:
        bank = read_kernels(Path(config.kernels))
        blocks = blocks_of(bank)
        with RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run:
            run.pin("learned_from.json", {config.kernels: file_digest(Path(config.kernels))})
            return _fit_blocks(config, bank, blocks, run.path)
    data = load_training_data(config, None)
    with RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run:
        run.pin("split.json", data.split.to_mapping())
        snapshots, best = train_source(config, data, run.path, device)
        best.save(run.path / "source.safetensors")
        bank = collect_kernels(snapshots)
        return _fit_blocks(config, bank, blocks_of(bank), run.path)


def blocks_of(bank: KernelBank) -> dict[str, tuple[str, ...]]:
    """The blocks of a bank, name → sites: those of `ResidualUNet3d`, or one for kernels of another network.

    Raises:
        PriorError: if kernels of another network have several shapes.
    """
    blocks = {block: tuple(site for site in bank.kernels if in_block(site, block)) for block in PRIOR_BLOCKS}
    if sum(map(len, blocks.values())) == len(bank.kernels):
        return {block: sites for block, sites in blocks.items() if sites}
    shapes = {tuple(kernels.shape[1:]) for kernels in bank.kernels.values()}
    if len(shapes) > 1:
        listed = ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))
        raise PriorError(f"kernels: one prior cannot hold kernels of several shapes ({listed}); give one shape a file")
    return {_FOREIGN: tuple(bank.kernels)}


def _fit_blocks(
    config: FitPriorConfig, bank: KernelBank, blocks: Mapping[str, tuple[str, ...]], run: Path
) -> KernelPrior:
    bank.save(run)
    densities: dict[str, KernelVAE] = {}
    cards: dict[str, BlockCard] = {}
    kernels = {name: torch.cat([bank.kernels[site] for site in sites]) for name, sites in blocks.items()}
    for number, (name, sites) in enumerate(blocks.items()):
        path = run / "blocks" / f"{name}.safetensors"
        if not path.exists():
            with progress(f"prior of block '{name}'", 2 * config.vae_steps) as advance:
                vae, nats = fit_kernel_vae(
                    kernels[name],
                    torch.cat([bank.bootstraps(site) for site in sites]),
                    _distinct([bank.identities(site) for site in sites]),
                    latent_size=config.latent_size,
                    hidden=config.hidden,
                    steps=config.vae_steps,
                    seed=config.seed * 1009 + number,
                    advance=partial(advance, ""),
                )
            save_tensors(path, vae.state_dict(), nats)
        tensors, nats = load_tensors(path)
        vae = KernelVAE(kernels[name].shape[1:], config.latent_size, config.hidden)
        vae.load_state_dict(tensors)
        densities[name] = vae
        # One block of a foreign network stands for every site of the target.
        names = (ANY_SITE,) if name == _FOREIGN else sites
        cards[name] = BlockCard(names, len(kernels[name]), nats)
    provenance = {
        "dataset": config.dataset if config.kernels is None else None,
        "kernels": None if config.kernels is None else Path(config.kernels).name,
        "modality": list(config.modality),
        "bootstraps": len({source.bootstrap for source in bank.sources}),
        "snapshots": len(bank.sources),
        "dice": [source.dice for source in bank.sources],
    }
    prior = KernelPrior(densities, cards, provenance).requires_grad_(False)
    save_kernel_figure(run / "kernels.png", kernels, prior)
    prior.save(run)
    return prior


def _distinct(identities: list[Tensor]) -> Tensor:
    """Concatenate the kernel identities of several sites, no number serving two sites."""
    offsets = [0, *itertools.accumulate(int(part.max()) + 1 for part in identities)]
    return torch.cat([part + offset for part, offset in zip(identities, offsets, strict=False)])
