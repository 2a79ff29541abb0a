"""`fit-prior`: source networks, their kernels, and one density per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.names import FAMILIES
from dwp_pyro.config.training import FitPriorConfig
from dwp_pyro.data.preprocessing import NORMALIZATION
from dwp_pyro.densities import DENSITIES, BlockKernels
from dwp_pyro.densities.fit_density import fit_density
from dwp_pyro.densities.gaussian import fold_moments, kernel_gaussian
from dwp_pyro.densities.kernel_distribution import KernelDistribution
from dwp_pyro.inference.posterior import NetworkConfig, Posterior
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.plots.kernels import save_kernel_figure
from dwp_pyro.priors.bank import KernelBank, collect_kernels, read_kernels
from dwp_pyro.priors.blocks import assign_blocks, by_block, prior_blocks, read_blocks, write_blocks
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.priors.pack import save_pack
from dwp_pyro.priors.private import check_networks, privacy_statement, private_moments
from dwp_pyro.runtime.device import catch_out_of_memory, torch_device
from dwp_pyro.runtime.errors import FolderTaken, PriorError, RunOutdated
from dwp_pyro.runtime.files import file_digest, files_digest
from dwp_pyro.runtime.progress import each
from dwp_pyro.runtime.run_folder import RunFolder
from dwp_pyro.runtime.tensors import fill_module, load_tensors, save_tensors
from dwp_pyro.training.network_training import network_config_for
from dwp_pyro.training.source_networks import train_source
from dwp_pyro.training.tracking import check_tracker, tracked
from dwp_pyro.training.training_data import SOURCE, load_training_data, resolve

__all__ = ["blocks_of", "fit_prior"]

_FOREIGN = "all"  # block of kernels from an unknown network


def fit_prior(config: FitPriorConfig, options: RunOptions) -> KernelPrior:
    """Learn a prior over kernels, from source scans or from kernels in a file.

    Writes to `options.out`: `prior.safetensors` and `prior.json`, `moments.safetensors`, its model card `card.md`,
    `kernels.safetensors` and `kernels.json`, `kernels.png`, `blocks.yaml`, the fitted densities in `blocks/` (without
    `epsilon`), and, if networks were trained, `source.safetensors` (the best of each bootstrap), `source/` (all
    snapshots) and the metrics. A `source.safetensors` beside a file of kernels is copied, so that a second prior from
    the same kernels is as complete as the first.

    Args:
        config: Settings.
        options: Output folder, device, and how to treat an existing run.

    Returns:
        The prior, with held-out log-densities in its `block_infos`.

    Raises:
        UserError: if the scans, the kernels or the folder are invalid, before anything is written.

    Examples:
        With a folder `data/ms` of scans, and few steps:

        >>> from pathlib import Path
        >>> from dwp_pyro import FitPriorConfig, RunOptions, fit_prior
        >>> config = FitPriorConfig(
        ...     root="data/ms", widths=(2, 3, 4, 5), patch=16, steps=2, bootstraps=1, validation=1, density_steps=2
        ... )
        >>> prior = fit_prior(config, RunOptions(Path("runs/prior-ms")))
        >>> list(prior.block_infos), prior.block_infos["input"].kernels
        (['input', 'scale1', 'scale2', 'bottom', 'up1', 'up2', 'up3'], 16)
    """
    torch_device(options.device)  # an unknown device is an error before anything is written
    check_tracker(options)
    if config.kernels is None:
        config = resolve(config, None)
    folder = (options.out, "fit-prior", config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    if config.kernels is not None:
        if options.out.resolve() in Path(config.kernels).resolve().parents:
            raise FolderTaken(f"{options.out}: holds the kernels to fit to, {config.kernels}")
        bank = read_kernels(Path(config.kernels))
        blocks = blocks_of(bank, config.blocks)
        if config.epsilon is not None:
            check_networks(bank, config.kernels)
        path = Path(config.kernels).parent / SOURCE
        sources = Posterior.load(path) if path.exists() else None
    else:
        data = load_training_data(config, None)
        blocks = by_block(assign_blocks(network_config_for(config, data).build(), config.blocks))
    digests = {Path(file).name: file_digest(Path(file)) for file in (config.kernels, config.blocks) if file is not None}
    if config.kernels is None:
        digests["scans"] = files_digest(data.files)
    with (
        RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run,
        tracked(run.path, config.to_mapping(), options) as track,
    ):
        run.pin("learned_from.json", digests)
        if config.kernels is None:
            run.pin("split.json", asdict(data.split))
            with catch_out_of_memory(str(run.path)):
                snapshots, sources = train_source(config, data, options, track)
            bank = collect_kernels(snapshots)
        if sources is not None:
            sources.save(run.path / SOURCE)
        return _fit_blocks(config, bank, blocks, run.path)


def blocks_of(bank: KernelBank, file: str | None) -> dict[str, tuple[str, ...]]:
    """Return the blocks of a bank, name → sites.

    They are those of the file if there is one, else those of the network that the bank describes, or of the published
    `ResidualUNet3d`, which has all sites of the default network. Kernels of an unknown network are one block.

    Raises:
        ConfigError: if the file does not fit the bank.
        PriorError: if kernels of one block have several shapes.
    """
    blocks = _blocks_of(bank, file)
    for name, sites in blocks.items():
        shapes = {tuple(bank.kernels[site].shape[1:]) for site in sites}
        if len(shapes) > 1:
            listed = ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))
            raise PriorError(
                f"kernels: block '{name}' cannot hold kernels of several shapes ({listed}); give one file per shape, "
                "or other blocks"
            )
    return blocks


def _blocks_of(bank: KernelBank, file: str | None) -> dict[str, tuple[str, ...]]:
    if file is not None:
        return by_block(read_blocks(Path(file), bank.kernels))
    published = ResidualUNet3d(1, 2, paper=True)
    try:
        with torch.device("meta"):  # wrong widths in a damaged description must not allocate memory
            known = NetworkConfig.from_mapping(bank.sources[0].network).build() if bank.sources else published
    except (TypeError, ValueError, RuntimeError):  # described by another program or version
        known = published
    blocks = {site: block for site, block in prior_blocks(known).items() if site in bank.kernels}
    if len(blocks) == len(bank.kernels):
        return by_block(blocks)
    return {_FOREIGN: tuple(bank.kernels)}


def _fit_blocks(
    config: FitPriorConfig, bank: KernelBank, blocks: Mapping[str, tuple[str, ...]], run: Path
) -> KernelPrior:
    bank.save(run)
    write_blocks(run, {site: block for block, sites in blocks.items() for site in sites})
    kernels = {name: bank.block(sites) for name, sites in blocks.items()}
    if config.epsilon is None:
        best, densities, nats = _best_fits(config, kernels, run)
        moments = {name: fold_moments(block.kernels, block.identities) for name, block in kernels.items()}
    else:
        # The generator's seed is the operating system's: with a known one the noise could be subtracted.
        moments = private_moments(kernels, config.epsilon, config.delta, config.clip, np.random.default_rng())
        best, nats = config.family, {name: {} for name in kernels}
        densities = {name: kernel_gaussian(block.kernels.shape[1:], moments[name]) for name, block in kernels.items()}
    # The block of an unknown network is used for every site of the target.
    block_infos = {
        name: BlockInfo(
            (ANY_SITE,) if name == _FOREIGN and config.blocks is None else sites, len(kernels[name]), nats[name]
        )
        for name, sites in blocks.items()
    }
    network = dict(bank.sources[0].network) if bank.sources else None
    provenance = {
        "source": config.source,
        "license": config.license,
        "dataset": _data_sets(config, bank),
        "kernels": None if config.kernels is None else Path(config.kernels).name,
        "network": network,
        "normalization": NORMALIZATION if network is not None else None,
        "bootstraps": len({source.bootstrap for source in bank.sources}),
        "snapshots": len(bank.sources),
        "snapshot_ids": [[source.bootstrap, source.snapshot] for source in bank.sources],
        # Exact results of a network are not private.
        "dice": [None if config.epsilon else source.dice for source in bank.sources],
        "start_correlation": [None if config.epsilon else source.start_correlation for source in bank.sources],
    }
    if config.epsilon is not None:
        provenance["privacy"] = privacy_statement(config.epsilon, config.delta, config.clip)
    prior = KernelPrior(best, densities, block_infos, provenance).requires_grad_(False)
    save_kernel_figure(run / "kernels.png", prior, {name: block.kernels for name, block in kernels.items()})
    save_pack(run, prior, moments)
    return prior


def _best_fits(
    config: FitPriorConfig, kernels: Mapping[str, BlockKernels], run: Path
) -> tuple[str, dict[str, KernelDistribution], dict[str, dict[str, float]]]:
    """Return the family with the highest held-out density of all kernels, its densities and the held-out nats."""
    fits: dict[str, dict[str, tuple[KernelDistribution, dict[str, float]]]] = {}
    for family in FAMILIES if config.family == "auto" else (config.family,):
        fits[family] = {}
        for number, (name, block) in enumerate(each(kernels.items(), f"{family} prior of each block")):
            fits[family][name] = _fit(config, family, name, number, block, run)
    best = max(fits, key=lambda family: sum(len(kernels[name]) * fits[family][name][1]["prior"] for name in kernels))
    densities = {name: density for name, (density, _) in fits[best].items()}
    nats = {name: of_block for name, (_, of_block) in fits[best].items()}
    if len(fits) > 1:
        for family, fit in fits.items():
            for name, (_, of_block) in fit.items():
                nats[name][family] = of_block["prior"]
    return best, densities, nats


def _data_sets(config: FitPriorConfig, bank: KernelBank) -> str | None:
    """Return the layout of the source scans, or the folder names of several data sets."""
    if config.root is not None and config.more_roots:
        return ", ".join(Path(root).name for root in (config.root, *config.more_roots))
    return bank.sources[0].dataset if bank.sources else None


def _fit(
    config: FitPriorConfig, family: str, name: str, number: int, block: BlockKernels, run: Path
) -> tuple[KernelDistribution, dict[str, float]]:
    """Return the density of one block and its held-out nats, loaded from `run/blocks` if fitted before."""
    path = run / "blocks" / f"{name}-{family}.safetensors"
    if not path.exists():
        form = {"latent_size": config.latent_size, "hidden": config.hidden} if family == "dwp" else {}
        density, nats = fit_density(family, block, config.density_steps, config.seed * 1009 + number, form)
        save_tensors(path, density.state_dict(), {"form": density.init_args(), "nats": nats})
    tensors, metadata = load_tensors(path)
    try:
        density = DENSITIES[family](block.kernels.shape[1:], **metadata["form"])
        fill_module(density, tensors)
        return density, {str(name): float(nats) for name, nats in metadata["nats"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise RunOutdated(f"{path}: is not a density of this version") from problem
