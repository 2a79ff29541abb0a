"""Trains one network, Bayesian or not: what the source stage and every arm on the target share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import nn

from dwp_pyro.config import DEFAULT_EVIDENCE, TrainingSettings
from dwp_pyro.data.transforms import Patches
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.checkpoint import steps_reported
from dwp_pyro.inference.device import warn_of_emulation
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.inference.posterior_predictive import posterior_mean_probability
from dwp_pyro.inference.svi import TrainingSchedule, fit
from dwp_pyro.models.likelihoods import choose_activation, region_masks
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.pipeline.metrics_log import MetricsLog, Track
from dwp_pyro.pipeline.training_data import TrainingData
from dwp_pyro.progress import message

__all__ = [
    "Program",
    "have_learned",
    "network_card",
    "report_learned",
    "train_network",
    "trained_member",
    "training_patches",
    "validation_dice",
]

_LEARNED = 0.5  # of the best Dice
_LEAST_BEST = 0.1  # below it the training has failed as a whole, and none is worse than the others


def network_card(settings: TrainingSettings, data: TrainingData) -> NetworkCard:
    """The form of a network for these settings and data."""
    return NetworkCard(
        modalities=settings.modality,
        regions=tuple(data.regions),
        activation=choose_activation(data.regions.values()),
        values=tuple(tuple(sorted(values)) for values in data.regions.values()),
        layout=data.layout,
        spacing=settings.spacing or None,
        patch=data.patch,
        network=settings.network,
        widths=settings.widths,
        may_lack_modalities=settings.modality_dropout > 0,
    )


class Program(NamedTuple):
    """What is trained.

    Args:
        network: Network, bare or made a program by `bayesianize`.
        guide: Guide of its sites.
        blocks: Site → prior block.
        priors: Site → function that returns its prior.
        prior_modules: Modules that the priors belong to; see `SegmentationModel`.
        l2_sp: Weight of L2-SP, towards the weights that the network has at its start.
    """

    network: nn.Module
    guide: MeanFieldNormal | None = None
    blocks: Mapping[str, str] = MappingProxyType({})
    priors: Mapping[str, Callable[[], TorchDistribution]] = MappingProxyType({})
    prior_modules: Mapping[str, nn.Module] = MappingProxyType({})
    l2_sp: float = 0.0

    def model(
        self, card: NetworkCard, settings: TrainingSettings, num_cases: int, evidence: float
    ) -> SegmentationModel:
        """The generative program on so many cases, each of them λ = `evidence` observations."""
        return SegmentationModel(
            self.network,
            settings.likelihood,
            num_cases,
            evidence,
            self.prior_modules,
            self.l2_sp,
            settings.precision,
            card.activation,
            settings.dice_weight,
        )


def training_patches(data: TrainingData, settings: TrainingSettings, seed: int, length: int) -> Patches:
    """Patches of the training cases, as the settings augment them."""
    mirror = [axis for axis in settings.mirror if axis != "none"]
    return Patches(data.train, data.patch, seed, length, settings.modality_dropout, mirror)


def train_network(
    program: Program,
    *,
    card: NetworkCard,
    data: TrainingData,
    settings: TrainingSettings,
    schedule: TrainingSchedule,
    run: Path,
    checkpoint: Path,
    device: torch.device,
    stage: str,
    track: Track,
    evidence: float = DEFAULT_EVIDENCE,
    at_step: Callable[[int, Callable[[], Posterior]], None] = lambda step, posterior: None,
) -> SegmentationModel:
    """Train in place on `data.train`, logging to `run`; resumes from `checkpoint` if it exists.

    Args:
        program: Program at its start.
        card: Form of the network.
        data: Cases to train and validate on.
        settings: Settings of the command.
        schedule: Rates and estimator.
        run: Folder of the run, for metrics.
        checkpoint: File of the optimizer's state.
        device: Device to train on.
        stage: Name of this training in the metrics.
        track: Function that gets the metrics too.
        evidence: Observations that a case counts as.
        at_step: Function called after each step with a function that gives the posterior so far.

    Returns:
        The trained model, on `device`.
    """
    guide = program.guide
    warn_of_emulation(settings.precision, device)
    model = program.model(card, settings, len(data.train), evidence)
    model.to(device)
    if guide is not None:
        guide.to(device)
    patches = training_patches(data, settings, schedule.seed, schedule.steps * settings.batch_size)

    def posterior() -> Posterior:
        return Posterior(card, [trained_member(program, card, device)])

    def validate() -> dict[str, float]:
        if not data.validation or (guide is None and program.blocks):
            return {}
        return {"validation_dice": validation_dice(posterior(), data, device)}

    with MetricsLog(run, stage, steps_reported(checkpoint), track) as log:
        fit(
            model,
            guide,
            patches,
            settings.batch_size,
            schedule,
            checkpoint,
            description=stage,
            log=lambda step, metrics: log(step, {**metrics, **({"evidence": evidence} if "loss" in metrics else {})}),
            validate=validate,
            at_step=lambda step: at_step(step, posterior),
        )
    return model


def trained_member(program: Program, card: NetworkCard, device: torch.device) -> Member:
    """A plain copy of a program's deterministic weights, beside the guide that holds those of its sites."""
    plain = card.build().to(device)
    plain.load_state_dict(program.network.state_dict(), strict=program.guide is None)
    return Member(plain, program.guide)


@torch.no_grad()
def validation_dice(posterior: Posterior, data: TrainingData, device: torch.device) -> float:
    """Mean Dice of the regions over the validation cases, on the network's grid, kernels at their means.

    A region that a case lacks is skipped: a network that predicts nothing would score 1 there. Where every case lacks
    every region, an empty prediction counts 1 and any other 0.
    """
    present: list[float] = []
    absent: list[float] = []
    for example in data.validation:
        assert example.label is not None
        probability = posterior_mean_probability(posterior, example.image.as_tensor().to(device))
        predicted = region_masks(probability, posterior.card.activation)
        predicted &= example.brain.as_tensor().to(device) == 1  # 2 is ignored
        for here, there in zip(predicted, example.label.as_tensor().to(device) > 0, strict=True):
            total = int(here.sum() + there.sum())
            dice = 2 * int((here & there).sum()) / total if total else 1.0
            (present if there.any() else absent).append(dice)
    scores = present or absent
    return sum(scores) / len(scores)


def have_learned(dice: Sequence[float | None]) -> list[bool]:
    """Which networks, trained alike, have learned: those with at least half of the best Dice.

    All of them, where the best is below 0.1; and a network without a Dice, where there are no validation cases.
    """
    known = [value for value in dice if value is not None]
    best = max(known, default=0.0)
    least = _LEARNED * best if best >= _LEAST_BEST else 0.0
    return [value is None or value >= least for value in dice]


def report_learned(kind: str, dices: Sequence[float | None]) -> list[bool]:
    """`have_learned`, with a line that gives the Dice of each of several networks and names those to leave out.

    Args:
        kind: "bootstrap" or "member".
        dices: Dice of each on the validation cases.
    """
    learned = have_learned(dices)
    for number, (dice, kept) in enumerate(zip(dices, learned, strict=True)):
        if dice is not None and len(dices) > 1:
            fate = "" if kept else ", less than half of the best: left out"
            message(f"{kind} {number}: Dice {dice:.3f} on validation cases{fate}")
    return learned
