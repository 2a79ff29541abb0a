"""`fit-prior`: source networks, their kernels, and a prior a block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dwp_pyro.config import FitPriorConfig, RunOptions
from dwp_pyro.data.transforms import NORMALISATION
from dwp_pyro.distributions.kernel_density import KernelDensity
from dwp_pyro.distributions.kernel_prior import ANY_SITE, DENSITIES, BlockCard, KernelPrior
from dwp_pyro.distributions.priors import FAMILIES
from dwp_pyro.errors import PriorError, RunError
from dwp_pyro.inference.device import TRAINS_IN_LESS, torch_device, within_memory
from dwp_pyro.inference.fit_density import BlockKernels, FitSettings, fit_density
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.models.blocks import prior_blocks
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.pipeline.blocks import assign_blocks, by_block, read_blocks, write_blocks
from dwp_pyro.pipeline.collect_kernels import KernelBank, collect_kernels, read_kernels
from dwp_pyro.pipeline.tracking import check_tracker, tracked
from dwp_pyro.pipeline.train_network import network_card
from dwp_pyro.pipeline.train_source import train_source
from dwp_pyro.pipeline.training_data import load_training_data, with_defaults
from dwp_pyro.progress import progress
from dwp_pyro.report.comparison import markdown
from dwp_pyro.report.prior import prior_card, save_kernel_figure
from dwp_pyro.storage import RunFolder, file_digest, write_bytes
from dwp_pyro.tensors import fill_module, load_tensors, save_tensors

__all__ = ["SOURCE", "blocks_of", "fit_prior"]

SOURCE = "source.safetensors"  # the source networks, one a bootstrap, the best first, in the folder of a prior

_FOREIGN = "all"  # the block of kernels that came from another network


def fit_prior(config: FitPriorConfig, options: RunOptions) -> KernelPrior:
    """Learn a prior over kernels, from source scans or from kernels in a file.

    Writes into `options.out`: `prior.safetensors` and `prior.json`, its card `card.md`, `kernels.safetensors` and
    `kernels.json`, `kernels.png`, and, where networks were trained, `source.safetensors` (the best of each bootstrap),
    `source/` (all of them) and the metrics. Kernels of a file that has source networks beside it bring them along: a
    second prior from the same bank is as complete as the first.

    Args:
        config: settings.
        options: where and how.

    Returns:
        The prior, its cards holding the held-out figures.

    Raises:
        UserError: if the scans, the kernels or the folder are unfit; nothing is then written.

    Example:
        Of a folder `data/ms` of scans, with a budget that suits a doctest:

        >>> from pathlib import Path
        >>> from dwp_pyro import FitPriorConfig, RunOptions, fit_prior
        >>> config = FitPriorConfig(
        ...     root="data/ms", widths=(2, 3, 4, 5), patch=16, steps=2, bootstraps=1, validation=1, vae_steps=2
        ... )
        >>> prior = fit_prior(config, RunOptions(Path("runs/prior-ms")))
        >>> list(prior.cards), prior.cards["input"].kernels
        (['input', 'scale1', 'scale2', 'bottom', 'up1', 'up2', 'up3'], 16)
    """
    device = torch_device(options.device)
    check_tracker(options)
    if config.kernels is None:
        config = with_defaults(config, None)
    folder = (options.out, "fit-prior", config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    if config.kernels is not None:
        if options.out.resolve() in Path(config.kernels).resolve().parents:
            raise PriorError(
                f"{config.kernels}: lies in {options.out}, which the new prior would replace; give another --out"
            )
        bank = read_kernels(Path(config.kernels))
        blocks = blocks_of(bank, config.blocks)
        path = Path(config.kernels).parent / SOURCE
        sources = Posterior.load(path) if path.exists() else None
        with (
            RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run,
            tracked(run.path, config.to_mapping(), options),
        ):
            run.pin("learned_from.json", _digests(config.kernels, config.blocks))
            if sources is not None:
                sources.save(run.path / SOURCE)
            return _fit_blocks(config, bank, blocks, run.path)
    data = load_training_data(config, None)
    blocks = by_block(assign_blocks(network_card(config, data).build(), config.blocks))
    with (
        RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run,
        tracked(run.path, config.to_mapping(), options) as track,
    ):
        run.pin("split.json", data.split.to_mapping())
        run.pin("learned_from.json", _digests(config.blocks))
        with within_memory(str(run.path), TRAINS_IN_LESS):
            snapshots, best = train_source(config, data, run.path, device, track)
        best.save(run.path / SOURCE)
        bank = collect_kernels(snapshots)
        return _fit_blocks(config, bank, blocks, run.path)


def blocks_of(bank: KernelBank, file: str | None) -> dict[str, tuple[str, ...]]:
    """The blocks of a bank, name → sites: as the file says; else those of the network that the bank came from, of
    the published `ResidualUNet3d`, which has every site of the default, where it does not say; or one for kernels of
    an unknown network.

    Raises:
        ConfigError: if the file does not fit the bank.
        PriorError: if kernels of an unknown network have several shapes.
    """
    if file is not None:
        return by_block(read_blocks(Path(file), bank.kernels))
    published = ResidualUNet3d(1, 2, paper=True)
    try:
        known = NetworkCard.from_mapping(bank.sources[0].network).build() if bank.sources else published
    except (TypeError, ValueError):  # the description of another program, or of an earlier version
        known = published
    blocks = {site: block for site, block in prior_blocks(known).items() if site in bank.kernels}
    if len(blocks) == len(bank.kernels):
        return by_block(blocks)
    shapes = {tuple(kernels.shape[1:]) for kernels in bank.kernels.values()}
    if len(shapes) > 1:
        listed = ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))
        raise PriorError(f"kernels: one prior cannot hold kernels of several shapes ({listed}); give one shape a file")
    return {_FOREIGN: tuple(bank.kernels)}


def _digests(*files: str | None) -> dict[str, str]:
    return {file: file_digest(Path(file)) for file in files if file is not None}


def _fit_blocks(
    config: FitPriorConfig, bank: KernelBank, blocks: Mapping[str, tuple[str, ...]], run: Path
) -> KernelPrior:
    bank.save(run)
    write_blocks(run, {site: block for block, sites in blocks.items() for site in sites})
    kernels = {
        name: BlockKernels(
            torch.cat([bank.kernels[site] for site in sites]),
            torch.cat([bank.bootstraps(site) for site in sites]),
            _distinct([bank.identities(site) for site in sites]),
        )
        for name, sites in blocks.items()
    }
    fits = {
        family: {
            name: _fit(config, family, name, number, block, run) for number, (name, block) in enumerate(kernels.items())
        }
        for family in (FAMILIES if config.family == "auto" else (config.family,))
    }
    # Of the families, the one that gives all kernels together the highest held-out density.
    best = max(fits, key=lambda family: sum(len(kernels[name]) * fits[family][name][1]["prior"] for name in kernels))
    cards = {}
    for name, sites in blocks.items():
        nats = dict(fits[best][name][1])
        if len(fits) > 1:
            nats |= {family: fit[name][1]["prior"] for family, fit in fits.items()}
        # One block of a foreign network stands for every site of the target.
        cards[name] = BlockCard((ANY_SITE,) if name == _FOREIGN else sites, len(kernels[name]), nats)
    network = dict(bank.sources[0].network) if bank.sources else None
    provenance = {
        "source": config.source,
        "licence": config.licence,
        "dataset": bank.sources[0].dataset if bank.sources else None,
        "kernels": None if config.kernels is None else Path(config.kernels).name,
        "network": network,
        "normalisation": NORMALISATION if network is not None else None,
        "bootstraps": len({source.bootstrap for source in bank.sources}),
        "snapshots": len(bank.sources),
        "snapshot_ids": [[source.bootstrap, source.snapshot] for source in bank.sources],
        "dice": [source.dice for source in bank.sources],
        "start_correlation": [source.start_correlation for source in bank.sources],
    }
    densities = {name: density for name, (density, _) in fits[best].items()}
    prior = KernelPrior(best, densities, cards, provenance).requires_grad_(False)
    save_kernel_figure(run / "kernels.png", prior, {name: block.kernels for name, block in kernels.items()})
    write_bytes(run / "card.md", markdown(prior_card(prior)).encode())
    prior.save(run)
    return prior


def _fit(
    config: FitPriorConfig, family: str, name: str, number: int, block: BlockKernels, run: Path
) -> tuple[KernelDensity, dict[str, float]]:
    """The density of one block and its held-out nats, from `run/blocks` if it has been fitted before."""
    path = run / "blocks" / f"{name}-{family}.safetensors"
    if not path.exists():
        settings = FitSettings(config.latent_size, config.hidden, config.vae_steps, config.seed * 1009 + number)
        with progress(f"{family} prior of block '{name}'", 2 * config.vae_steps) as advance:
            density, nats = fit_density(family, block, settings, partial(advance, ""))
        save_tensors(path, density.state_dict(), {"form": density.form(), "nats": nats})
    tensors, metadata = load_tensors(path)
    try:
        density = DENSITIES[family](block.kernels.shape[1:], **metadata["form"])
        fill_module(density, tensors)
        return density, {str(name): float(nats) for name, nats in metadata["nats"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise RunError(f"{path}: is not a density of this version; delete it, and go on by --resume") from problem


def _distinct(identities: list[Tensor]) -> Tensor:
    """Concatenate the kernel identities of several sites, no number serving two sites."""
    offsets = [0, *itertools.accumulate(int(part.max()) + 1 for part in identities)]
    return torch.cat([part + offset for part, offset in zip(identities, offsets, strict=False)])
