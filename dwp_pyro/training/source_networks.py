"""Source networks: trained on bootstraps of the source cases with a cyclic learning rate, and loaded as a start."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import FitPriorConfig
from dwp_pyro.data.preprocessing import Example
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.inference.schedule import TrainingSchedule
from dwp_pyro.priors.bank import KernelSource
from dwp_pyro.priors.blocks import kernel_sites
from dwp_pyro.runtime.device import catch_out_of_memory, torch_device
from dwp_pyro.runtime.errors import RunOutdated, SourceMissing
from dwp_pyro.runtime.files import locked, read_json, write_json
from dwp_pyro.runtime.run_folder import check_pinned
from dwp_pyro.training.metrics_log import Track, no_track
from dwp_pyro.training.network_training import (
    TrainingSetup,
    have_learned,
    network_config_for,
    train_network,
    validation_dice,
)
from dwp_pyro.training.training_data import SOURCE, TrainingData, load_training_data

__all__ = ["Snapshot", "bootstrap_cases", "load_source_network", "load_source_networks", "train_source"]

Snapshot = tuple[KernelSource, dict[str, Tensor]]


def train_source(
    config: FitPriorConfig, data: TrainingData, options: RunOptions, track: Track
) -> tuple[list[Snapshot], Posterior]:
    """Train a network on each bootstrap of the cases; take a snapshot at the end of each learning-rate cycle.

    In each cycle the rate falls to 0 along half a cosine (Huang et al. 2017, eq. 2). Snapshots are saved under
    `source` in the run folder; finished bootstraps are not trained again.

    Args:
        config: Resolved settings.
        data: Cases.
        options: Run folder, device, and workers that train the bootstraps, if any.
        track: Function that also receives the metrics.

    Returns:
        Source and kernels (site → weight) of each snapshot, in order; and a posterior of one snapshot per bootstrap,
        the one with the best Dice on the validation cases (the last without validation cases), the best bootstrap
        first. Both exclude bootstraps that have not learned (`have_learned`); with `epsilon` the kernels are those of
        all bootstraps, since the Dice of one would decide on others.
    """
    run = options.out
    stages = [f"bootstrap{number}" for number in range(config.bootstraps)]
    last = f"snapshot{config.snapshots - 1}.json"  # marks a finished bootstrap
    untrained = [stage for stage in stages if not (run / "source" / stage / last).exists()]
    if options.workers is not None:
        work = partial(_train_in_worker, config, run, options.device)
        options.workers.at_most(config.bootstraps).map(work, untrained, lambda stage, _: None)
    else:
        for stage in untrained:
            _train_bootstrap(config, data, run, stage, torch_device(options.device), track)
    trained: list[list[tuple[KernelSource, Member]]] = []  # per bootstrap, its snapshots
    for bootstrap, stage in enumerate(stages):
        folder = run / "source" / stage
        for checkpoint in folder.glob("*checkpoint.safetensors"):  # and what a killed write has left of one
            checkpoint.unlink()
        trained.append([])
        for number in range(config.snapshots):
            posterior = Posterior.load(folder / f"snapshot{number}.safetensors")
            dice, correlation = _read_snapshot_metrics(folder / f"snapshot{number}.json")
            source = KernelSource(bootstrap, number, data.layout, asdict(posterior.network_config), dice, correlation)
            trained[-1].append((source, posterior.members[0]))
    # Without Dice the last snapshot is the best.
    best = [max(snapshots, key=lambda s: s[0].snapshot if s[0].dice is None else s[0].dice) for snapshots in trained]
    learned = have_learned("bootstrap", [source.dice for source, _ in best])
    kept = sorted(itertools.compress(best, learned), key=lambda snapshot: -(snapshot[0].dice or 0.0))
    bank = [
        (source, {name: weight.detach() for name, weight in kernel_sites(member.network).items()})
        for snapshots in (trained if config.epsilon is not None else itertools.compress(trained, learned))
        for source, member in snapshots
    ]
    return bank, Posterior(posterior.network_config, [member for _, member in kept])


def _read_snapshot_metrics(path: Path) -> tuple[float | None, float | None]:
    """Return the Dice of a snapshot and the correlation of its kernels with the initial ones; None if not known."""
    metrics = read_json(path)
    dice, correlation = (metrics.get(name) for name in ("dice", "start_correlation"))
    if not all(value is None or isinstance(value, float) for value in (dice, correlation)):
        raise RunOutdated(f"{path}: does not hold the metrics of a snapshot")
    return dice, correlation


def _train_in_worker(config: FitPriorConfig, run: Path, device: str, stage: str) -> None:
    with catch_out_of_memory(str(run)):
        data = load_training_data(config, None)
        check_pinned(run / "split.json", asdict(data.split))
        _train_bootstrap(config, data, run, stage, torch_device(device), no_track)


def _train_bootstrap(
    config: FitPriorConfig, data: TrainingData, run: Path, stage: str, device: torch.device, track: Track
) -> None:
    folder, bootstrap = run / "source" / stage, int(stage.removeprefix("bootstrap"))
    bag = dataclasses.replace(data, train=bootstrap_cases(data, config.seed, bootstrap))
    ends = [round(number * config.steps / config.snapshots) for number in range(config.snapshots + 1)]
    seed = config.seed * 1009 + bootstrap  # distinct for each bootstrap

    def snapshot(step: int, current: Callable[[], Posterior]) -> None:
        if step not in ends:
            return
        posterior = current()
        number = ends.index(step) - 1
        dice = validation_dice(posterior, data, device)
        posterior.save(folder / f"snapshot{number}.safetensors")
        correlation = torch.corrcoef(torch.stack([start, _flat(posterior.members[0].network)]))[0, 1]
        write_json(
            folder / f"snapshot{number}.json", {"step": step, "dice": dice, "start_correlation": float(correlation)}
        )

    def learning_rate(step: int) -> float:
        cycle = next(number for number, end in enumerate(ends[1:]) if step < end)
        fraction = (step - ends[cycle]) / (ends[cycle + 1] - ends[cycle])
        return 0.5 * config.learning_rate * (1 + math.cos(math.pi * fraction))

    torch.manual_seed(seed)
    network = network_config_for(config, data).build()
    start = _flat(network)
    schedule = TrainingSchedule(
        steps=config.steps,
        learning_rate=learning_rate,
        seed=seed,
        weight_decay=config.weight_decay,
        validate_every=max(1, config.steps // config.snapshots),
    )
    with locked(run, f".lock-{stage}"):  # a worker of a cluster outlives its command
        train_network(
            TrainingSetup(network),
            data=bag,
            settings=config,
            schedule=schedule,
            run=run,
            checkpoint=folder / "checkpoint.safetensors",
            device=device,
            stage=stage,
            track=track,
            at_step=snapshot,
        )


def bootstrap_cases(data: TrainingData, seed: int, bootstrap: int) -> tuple[Example, ...]:
    """Draw as many patients as there are, with replacement; repeated draws of a patient cycle through its scans.

    Args:
        data: Cases, of which those for training are drawn.
        seed: Seed of the run of fit-prior.
        bootstrap: Number of the bootstrap, from 0.

    Returns:
        One scan per drawn patient.
    """
    random = np.random.default_rng([seed, bootstrap])
    scans: dict[str, list[Example]] = {}
    for example in data.train:
        scans.setdefault(data.patients[example.id], []).append(example)
    endless = [itertools.cycle(of_patient) for of_patient in scans.values()]
    return tuple(next(endless[i]) for i in random.integers(len(endless), size=len(endless)))


def _flat(network: nn.Module) -> Tensor:
    """Return all kernels as one vector."""
    return torch.cat([kernels.detach().flatten().cpu() for kernels in kernel_sites(network).values()])


def load_source_network(folder: Path, network_config: NetworkConfig, member: int) -> nn.Module:
    """Load a source network that fit-prior saved, for a target of the same architecture; member 0 is the best.

    If it segments one region and the target several, each of them starts from that region; as many regions of other
    names start from its regions in order. Input kernels of modalities that the source network lacks start at 0.

    Raises:
        RunError: if there is no such network, or its architecture, modalities, widths or regions do not fit.
    """
    path = folder / SOURCE
    source = load_source_networks(folder)
    for name in ("network", "modalities", "widths"):
        found, expected = getattr(source.network_config, name), getattr(network_config, name)
        if found != expected and not (name == "modalities" and set(found) < set(expected)):
            remedy = "; omit widths to take those of the source network" if name == "widths" else ""
            raise SourceMissing(f"{path}: the source network has {name} {found}, the target {expected}{remedy}")
    if member >= len(source.members):
        raise SourceMissing(
            f"{path}: holds {len(source.members)} source networks, one per bootstrap, and each member needs its own; "
            f"give at most {len(source.members)} members, or fit the prior with more bootstraps"
        )
    found, expected = source.network_config.regions, network_config.regions
    if 1 < len(found) != len(expected):
        raise SourceMissing(f"{path}: the source network segments {len(found)} regions, the target {len(expected)}")
    if found != expected and set(found) == set(expected):
        raise SourceMissing(
            f"{path}: the source network segments {', '.join(found)}, the target {', '.join(expected)}; "
            "give the regions in the order of the source network"
        )
    network = _with_channels(source.members[member].network, source.network_config, network_config)
    return network.requires_grad_(True)


def load_source_networks(folder: Path) -> Posterior:
    """Load all source networks that fit-prior saved, the best first.

    Raises:
        RunError: if there is none, or the file is damaged.
    """
    path = folder / SOURCE
    if not path.exists():
        raise SourceMissing(f"{path}: no source network" if folder.is_dir() else f"{folder}: no such folder")
    return Posterior.load(path)


def _with_channels(source: nn.Module, source_config: NetworkConfig, network_config: NetworkConfig) -> nn.Module:
    """Return a network with the weights of a source network, for more input channels, or more regions than its one."""
    network = network_config.build()
    rows = torch.tensor([0, *[1] * len(network_config.regions)])  # background, then the region for each
    columns = [network_config.modalities.index(name) for name in source_config.modalities]
    weights = source.state_dict()
    for name, like in network.state_dict().items():
        weight = weights[name]
        if len(weight) != len(like):
            weight = weight[rows]
        if weight.shape != like.shape:  # the input, in the order of the target's modalities
            weight, found = torch.zeros_like(like), weight
            weight[:, columns] = found
        weights[name] = weight
    network.load_state_dict(weights)
    return network
