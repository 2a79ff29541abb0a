"""Source networks: bootstraps of the source cases, and snapshots of a cyclic learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dwp_pyro.config import FitPriorConfig
from dwp_pyro.data.transforms import Example
from dwp_pyro.errors import RunError
from dwp_pyro.inference.posterior import Member, Posterior
from dwp_pyro.inference.svi import TrainingSchedule
from dwp_pyro.models.blocks import kernel_sites
from dwp_pyro.pipeline.collect_kernels import KernelSource
from dwp_pyro.pipeline.metrics_log import Track
from dwp_pyro.pipeline.train_network import Program, network_card, report_learned, train_network, validation_dice
from dwp_pyro.pipeline.training_data import TrainingData
from dwp_pyro.storage import read_json, write_json

__all__ = ["Snapshot", "train_source"]

Snapshot = tuple[KernelSource, dict[str, Tensor]]


def train_source(
    config: FitPriorConfig, data: TrainingData, run: Path, device: torch.device, track: Track
) -> tuple[list[Snapshot], Posterior]:
    """Train a network on each bootstrap of the cases; take a snapshot where the learning rate has come down.

    The rate falls from its highest to 0 along half a cosine in each cycle (Huang et al. 2017, eq. 2).
    Snapshots are saved under `run/source`; those that are there are not made again.

    Args:
        config: of fit-prior.
        data: the source cases.
        run: folder of the run.
        device: to train on.
        track: told of the figures of every training.

    Returns:
        Each snapshot's source and kernels (site → weight), in order; and of each bootstrap the snapshot with the
        best Dice on the validation cases, the best bootstrap first (where there are none: its last snapshot).
        Bootstraps whose best snapshot has not learned are in neither; see `have_learned`.
    """
    trained: list[tuple[list[Snapshot], list[Member]]] = []
    for bootstrap in range(config.bootstraps):
        folder = run / "source" / f"bootstrap{bootstrap}"
        if not (folder / f"snapshot{config.snapshots - 1}.json").exists():
            _train_bootstrap(config, data, run, folder, bootstrap, device, track)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        snapshots: list[Snapshot] = []
        members: list[Member] = []
        for number in range(config.snapshots):
            posterior = Posterior.load(folder / f"snapshot{number}.safetensors")
            dice, correlation = _read_figures(folder / f"snapshot{number}.json")
            source = KernelSource(bootstrap, number, data.layout, asdict(posterior.card), dice, correlation)
            (member,) = posterior.members
            snapshots.append((source, {name: w.detach() for name, w in kernel_sites(member.network).items()}))
            members.append(member)
        trained.append((snapshots, members))
    best = [_best(snapshots) for snapshots, _ in trained]
    dices = [snapshots[number][0].dice for (snapshots, _), number in zip(trained, best, strict=True)]
    learned = report_learned("bootstrap", dices)
    order = sorted((n for n, kept in enumerate(learned) if kept), key=lambda n: -(dices[n] or 0.0))
    bank = [snapshot for n, (snapshots, _) in enumerate(trained) if learned[n] for snapshot in snapshots]
    return bank, Posterior(posterior.card, [trained[n][1][best[n]] for n in order])


def _best(snapshots: list[Snapshot]) -> int:
    """Number of the snapshot with the highest Dice; of the last one where there is no Dice."""
    ranks = [number if snapshot.dice is None else snapshot.dice for number, (snapshot, _) in enumerate(snapshots)]
    return ranks.index(max(ranks))


def _read_figures(path: Path) -> tuple[float | None, float | None]:
    """Dice of a snapshot, and the correlation of its kernels with those at the start; None where there is none."""
    figures = read_json(path)
    dice, correlation = (figures.get(name) for name in ("dice", "start_correlation"))
    if not all(figure is None or isinstance(figure, float) for figure in (dice, correlation)):
        raise RunError(f"{path}: does not hold the figures of a snapshot; give --overwrite to start again")
    return dice, correlation


def _train_bootstrap(
    config: FitPriorConfig,
    data: TrainingData,
    run: Path,
    folder: Path,
    bootstrap: int,
    device: torch.device,
    track: Track,
) -> None:
    bag = dataclasses.replace(data, train=_bag(data, np.random.default_rng([config.seed, bootstrap])))
    ends = [round(number * config.steps / config.snapshots) for number in range(config.snapshots + 1)]
    seed = config.seed * 1009 + bootstrap  # as far apart as bootstraps are

    def snapshot(step: int, current: Callable[[], Posterior]) -> None:
        if step not in ends:
            return
        posterior = current()
        number = ends.index(step) - 1
        dice = validation_dice(posterior, data, device) if data.validation else None
        posterior.save(folder / f"snapshot{number}.safetensors")
        correlation = torch.corrcoef(torch.stack([start, _flat(posterior.members[0].network)]))[0, 1]
        write_json(
            folder / f"snapshot{number}.json", {"step": step, "dice": dice, "start_correlation": float(correlation)}
        )

    def learning_rate(step: int) -> float:
        cycle = next(number for number, end in enumerate(ends[1:]) if step < end)
        part = (step - ends[cycle]) / (ends[cycle + 1] - ends[cycle])
        return 0.5 * config.learning_rate * (1 + math.cos(math.pi * part))

    torch.manual_seed(seed)
    card = network_card(config, data)
    network = card.build()
    start = _flat(network)
    schedule = TrainingSchedule(
        steps=config.steps,
        learning_rate=learning_rate,
        seed=seed,
        weight_decay=config.weight_decay,
        validate_every=max(1, config.steps // config.snapshots),
    )
    train_network(
        Program(network),
        card=card,
        data=bag,
        settings=config,
        schedule=schedule,
        run=run,
        checkpoint=folder / "checkpoint.safetensors",
        device=device,
        stage=f"bootstrap{bootstrap}",
        track=track,
        at_step=snapshot,
    )


def _bag(data: TrainingData, random: np.random.Generator) -> tuple[Example, ...]:
    """As many patients as there are, drawn with replacement; each draw of a patient gives its next scan in turn."""
    scans: dict[str, list[Example]] = {}
    for example in data.train:
        scans.setdefault(data.patients[example.id], []).append(example)
    endless = [itertools.cycle(of_patient) for of_patient in scans.values()]
    return tuple(next(endless[i]) for i in random.integers(len(endless), size=len(endless)))


def _flat(network: nn.Module) -> Tensor:
    """All kernels in one row."""
    return torch.cat([kernels.detach().flatten().cpu() for kernels in kernel_sites(network).values()])
