"""Training commands: fit-prior, svi and finetune."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dwp_pyro.commands.console import logger, print_rows, print_tables
from dwp_pyro.commands.options import options_of_run, settings_options
from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig, TrainingConfig

if typing.TYPE_CHECKING:
    from dwp_pyro.priors.kernel_prior import KernelPrior

__all__ = ["finetune", "fit_prior", "svi"]


@click.command("fit-prior")
@settings_options(FitPriorConfig)
@options_of_run
def fit_prior(config: FitPriorConfig, out: Path | None, **options: Any) -> None:
    """Learn a prior over convolution kernels.

    Trains source networks on bootstraps of the scans, collects the kernels of their snapshots, and fits a
    density, such as a variational autoencoder, to the kernels of each block; --kernels fits to the kernels of a
    file instead.
    The prior is prior.json, prior.safetensors, moments.safetensors and card.md. They contain no images and no
    case ids and can be shared; other files of the run folder contain case ids and the source networks. Whether a
    network was among the sources can be told from them; --family gaussian --epsilon E adds noise against that.
    """
    from dwp_pyro.training.fit_prior import fit_prior as run

    # Without --dataset the folder is always prior-ms, the default of svi and finetune.
    source = (config.dataset or config.default_dataset) if config.kernels is None else Path(config.kernels).stem
    folder = out or Path(f"runs/prior-{source}")
    with _joined(folder, **options) as run_options:
        _print_prior(run(config, run_options), run_options.out)


def _print_prior(prior: KernelPrior, folder: Path) -> None:
    from dwp_pyro.priors.model_card import model_card

    provenance = prior.provenance
    sources = [
        [f"{bootstrap}", f"{snapshot}", *("-" if metric is None else f"{metric:.2f}" for metric in metrics)]
        for (bootstrap, snapshot), *metrics in zip(
            provenance["snapshot_ids"], provenance["dice"], provenance["start_correlation"], strict=True
        )
    ]
    if sources:
        click.echo("Source networks:")
        print_rows(["bootstrap", "snapshot", "Dice", "correlation with initialization"], sources)
        correlations = [correlation for correlation in provenance["start_correlation"] if correlation is not None]
        if correlations and min(correlations) > 0.5:
            click.echo(
                "The kernels are still close to their initial values, so this prior reflects the initialization more "
                "than the task: train with more --steps."
            )
        click.echo()
    print_tables(model_card(prior)[1:])
    click.echo(f"Prior: {folder}\nPlot: {folder / 'kernels.png'}")


@click.command()
@settings_options(SviConfig)
@options_of_run
def svi(config: SviConfig, out: Path | None, **options: Any) -> None:
    """Infer a network from n target scans, with a prior over its kernels.

    The method is mean-field variational inference. The prior comes with the package, or from fit-prior.
    """
    from dwp_pyro.training.svi import svi as run

    prior = config.prior if config.center is None else f"{config.prior}-around-{config.center}"
    folder = out or Path(f"runs/svi-{_dataset(config)}-{prior}-n{config.n}-seed{config.seed}")
    with _joined(folder, **options) as run_options:
        run(config, run_options)
        _print_trained(run_options.out)


@click.command()
@settings_options(FinetuneConfig)
@options_of_run
def finetune(config: FinetuneConfig, out: Path | None, **options: Any) -> None:
    """Train a deterministic network on n target scans, as a baseline.

    --init random is UNet-RI; --init source is UNet-PR; --init source --trainable first-last is UNet-PRf; --init source
    --l2-sp 10000 is L2-SP.
    """
    from dwp_pyro.training.finetune import finetune as run

    method = f"{config.init}-l2sp" if config.l2_sp else f"{config.init}-{config.trainable}"
    folder = out or Path(f"runs/finetune-{_dataset(config)}-{method}-n{config.n}-seed{config.seed}")
    with _joined(folder, **options) as run_options:
        run(config, run_options)
        _print_trained(run_options.out)


@contextmanager
def _joined(folder: Path, *, device: str, mlflow: bool, **options: Any) -> Iterator[RunOptions]:
    """Yield the options of this process; under `torchrun` a run has several."""
    from dwp_pyro.runtime.distributed import join_processes, process_number

    with join_processes(device, folder) as (own_device, own_folder):
        yield RunOptions(own_folder, own_device, mlflow=mlflow and process_number() == 0, **options)


def _dataset(config: TrainingConfig) -> str:
    """Return the name of the scans' layout for the run folder."""
    from dwp_pyro.training.training_data import open_scans

    _, layout = config.scans
    return layout or open_scans(config).layout


def _print_trained(folder: Path) -> None:
    from dwp_pyro.priors.blocks import BLOCKS_FILE
    from dwp_pyro.runtime.files import read_yaml

    path = folder / BLOCKS_FILE
    if path.exists():
        parts = [f"{block} ({len(names)})" for block, names in read_yaml(path).items()]
        click.echo(f"Prior blocks and their convolutions: {', '.join(parts)}; by name: {path}")
    click.echo(f"Run: {folder}")
    logger.info(f"Next: dwp-pyro evaluate {folder}   or: dwp-pyro predict {folder} SCANS")
