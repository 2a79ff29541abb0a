"""Training of one network, Bayesian or deterministic, for the source stage and all methods on the target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import TorchDistribution
from torch import nn

from dwp_pyro.config.training import DEFAULT_EVIDENCE, DEFAULT_WIDTHS, FitPriorConfig, TrainingConfig
from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.data.preprocessing import Example
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.checkpoint import steps_reported
from dwp_pyro.inference.loop import fit
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.inference.predictive import posterior_mean_probability
from dwp_pyro.inference.schedule import TrainingSchedule
from dwp_pyro.metrics.overlap import mean_dice
from dwp_pyro.models.likelihoods import choose_activation, region_masks
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.runtime.device import warn_if_emulated
from dwp_pyro.runtime.distributed import process_count
from dwp_pyro.training.metrics_log import MetricsLog, Track
from dwp_pyro.training.training_data import TrainingData

__all__ = [
    "TrainingSetup",
    "have_learned",
    "network_config_for",
    "train_network",
    "trained_member",
    "training_patches",
    "validation_dice",
]

_logger = logging.getLogger(__name__)

_LEARNED = 0.5  # fraction of the best Dice
_MIN_BEST = 0.1  # Dice below which all networks have failed and none is excluded


def network_config_for(settings: TrainingConfig, data: TrainingData) -> NetworkConfig:
    """Return the network's architecture and input for these settings and data."""
    return NetworkConfig(
        modalities=settings.modality,
        regions=tuple(data.regions),
        activation=choose_activation(data.regions.values()),
        values=tuple(tuple(sorted(values)) for values in data.regions.values()),
        layout=data.layout,
        spacing=settings.spacing or None,
        patch=data.patch,
        network=settings.network,
        widths=settings.widths or DEFAULT_WIDTHS,
        may_lack_modalities=settings.modality_dropout > 0,
    )


class TrainingSetup(NamedTuple):
    """A network with its guide and priors, at the start of its training.

    Args:
        network: Network, plain or converted by `bayesianize`.
        guide: Guide of its sites; None without sites, or to draw them from their priors.
        blocks: Site → prior block.
        priors: Site → function that returns its prior.
        prior_modules: Modules that the priors belong to; see `SegmentationModel`.
        l2_sp: Weight of L2-SP, the center of which is the network's initial weights.
    """

    network: nn.Module
    guide: MeanFieldNormal | None = None
    blocks: Mapping[str, str] = MappingProxyType({})
    priors: Mapping[str, Callable[[], TorchDistribution]] = MappingProxyType({})
    prior_modules: Mapping[str, nn.Module] = MappingProxyType({})
    l2_sp: float = 0.0


def training_patches(data: TrainingData, settings: TrainingConfig, seed: int, length: int) -> PatchDataset:
    """Return augmented patches of the training cases."""
    mirror = [axis for axis in settings.mirror if axis != "none"]
    randomize = isinstance(settings, FitPriorConfig) and settings.randomize
    return PatchDataset(data.train, data.patch, seed, length, settings.modality_dropout, mirror, randomize)


def train_network(
    setup: TrainingSetup,
    *,
    data: TrainingData,
    settings: TrainingConfig,
    schedule: TrainingSchedule,
    run: Path,
    checkpoint: Path,
    device: torch.device,
    stage: str,
    track: Track,
    evidence: float = DEFAULT_EVIDENCE,
    at_step: Callable[[int, Callable[[], Posterior]], None] = lambda step, posterior: None,
) -> SegmentationModel:
    """Train in place on `data.train` and log metrics to `run`; resume from `checkpoint` if it exists.

    `stage` names the training in the metrics, `evidence` is that of `SegmentationModel`, and `at_step` is called after
    each step with the step and a function that returns the current posterior. Returns the trained model, on `device`.
    """
    guide, network_config = setup.guide, network_config_for(settings, data)
    warn_if_emulated(settings.precision, device)
    model = SegmentationModel(
        setup.network,
        settings.likelihood,
        len(data.train),
        evidence,
        setup.prior_modules,
        setup.l2_sp,
        settings.precision,
        network_config.activation,
        settings.dice_weight,
    ).to(device)
    if guide is not None:
        guide.to(device)
    length = schedule.steps * settings.batch_size * process_count()
    patches = training_patches(data, settings, schedule.seed, length)

    def posterior() -> Posterior:
        return Posterior(network_config, [trained_member(setup, network_config, device)])

    def validate() -> dict[str, float]:
        # Kernels that are drawn from their priors have no means.
        dice = None if guide is None and setup.blocks else validation_dice(posterior(), data, device)
        return {} if dice is None else {"validation_dice": dice}

    with MetricsLog(run, stage, steps_reported(checkpoint), track) as log:
        fit(
            model,
            guide,
            patches,
            settings.batch_size,
            schedule,
            checkpoint,
            description=stage,
            log=log,
            validate=validate,
            at_step=lambda step: at_step(step, posterior),
        )
    return model


def trained_member(setup: TrainingSetup, network_config: NetworkConfig, device: torch.device) -> Member:
    """Return a copy of a setup's deterministic weights in a plain network, with the setup's guide."""
    plain = network_config.build().to(device)
    plain.load_state_dict(setup.network.state_dict(), strict=setup.guide is None)
    return Member(plain, setup.guide)


@torch.no_grad()
def validation_dice(posterior: Posterior, data: TrainingData, device: torch.device) -> float | None:
    """Return the `mean_dice` of the validation cases, on the network's grid, with kernels at their means.

    None without validation cases.
    """

    def masks(example: Example) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        assert example.label is not None
        probability = posterior_mean_probability(posterior, example.image.as_tensor().to(device))
        predicted = region_masks(probability, posterior.network_config.activation).cpu().numpy()
        counted = example.brain_mask.numpy() == 1
        return predicted & counted, (example.label.numpy() > 0) & counted

    return mean_dice(map(masks, data.validation)) if data.validation else None


def have_learned(kind: str, dice: Sequence[float | None]) -> list[bool]:
    """Return which networks of the same training have learned, those with at least half of the best Dice; log each.

    If the best Dice is below 0.1, all count as learned, as does a network without a Dice (without validation cases).

    Args:
        kind: "bootstrap" or "member".
        dice: Dice of each network on the validation cases.
    """
    known = [value for value in dice if value is not None]
    best = max(known, default=0.0)
    least = _LEARNED * best if best >= _MIN_BEST else 0.0
    learned = [value is None or value >= least for value in dice]
    for number, (value, kept) in enumerate(zip(dice, learned, strict=True)):
        if value is not None and len(dice) > 1:
            suffix = "" if kept else ", less than half of the best: skipped"
            _logger.info("%s %d: Dice %.3f on validation cases%s", kind, number, value, suffix)
    return learned
