"""Trains one network, Bayesian or not: what the source stage and every arm on the target share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwp_pyro.config import TrainingSettings
from dwp_pyro.data.transforms import Patches
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.device import warn_of_emulation
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.inference.posterior_predictive import posterior_mean_probability
from dwp_pyro.inference.svi import Plan, optimise, steps_reported
from dwp_pyro.models.likelihoods import choose_activation, region_masks
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.pipeline.metrics_log import MetricsLog, Track
from dwp_pyro.pipeline.training_data import TrainingData
from dwp_pyro.progress import message

__all__ = ["Program", "have_learned", "network_card", "report_learned", "train_network", "validation_dice"]

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
        network: bare, or made a program by `bayesianize`.
        guide: of its sites.
        blocks: of the sites: site → prior block.
        kernel_prior: the learned prior of the sites.
        pull: weight of L2-SP, towards the weights that the network has at its start.
    """

    network: nn.Module
    guide: MeanFieldNormal | None = None
    blocks: Mapping[str, str] = MappingProxyType({})
    kernel_prior: KernelPrior | None = None
    pull: float = 0.0


def train_network(
    program: Program,
    *,
    card: NetworkCard,
    data: TrainingData,
    settings: TrainingSettings,
    plan: Plan,
    run: Path,
    checkpoint: Path,
    device: torch.device,
    stage: str,
    track: Track,
    at_step: Callable[[int, Callable[[], Posterior]], None] = lambda step, posterior: None,
) -> Posterior:
    """Train in place on `data.train`, logging to `run`; resumes from `checkpoint` if it exists.

    Args:
        program: at its start.
        card: the network's form.
        data: to train and validate on.
        settings: of the command.
        plan: rates and estimator.
        run: folder of the run, for metrics.
        checkpoint: file of the optimiser's state.
        device: to train on.
        stage: name of this training in the metrics.
        track: told of the figures too.
        at_step: called after each step with a function that gives the posterior so far.

    Returns:
        The posterior of one member, on `device`.
    """
    network, guide, blocks, kernel_prior, pull = program
    warn_of_emulation(settings.precision, device)
    model = SegmentationModel(
        network,
        settings.likelihood,
        len(data.train),
        kernel_prior,
        pull,
        settings.precision,
        card.activation,
        settings.dice_weight,
    )
    model.to(device)
    if guide is not None:
        guide.to(device)
    mirror = [axis for axis in settings.mirror if axis != "none"]
    patches = Patches(
        data.train, data.patch, plan.seed, plan.steps * settings.batch_size, settings.modality_dropout, mirror
    )

    def posterior() -> Posterior:
        # A plain copy of the deterministic weights; the sites' weights come from the guide.
        plain = card.build().to(device)
        plain.load_state_dict(network.state_dict(), strict=guide is None)
        return Posterior(card, [Member(plain, guide)])

    def validate() -> dict[str, float]:
        figures = signal_to_noise(guide, blocks)
        if data.validation:
            figures["validation_dice"] = validation_dice(posterior(), data, device)
        return figures

    with MetricsLog(run, stage, steps_reported(checkpoint), track) as log:
        optimise(
            model,
            guide,
            patches,
            settings.batch_size,
            plan,
            checkpoint,
            description=stage,
            log=log,
            validate=validate,
            at_step=lambda step: at_step(step, posterior),
        )
    return posterior()


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


@torch.no_grad()
def signal_to_noise(guide: MeanFieldNormal | None, blocks: Mapping[str, str]) -> dict[str, float]:
    """For each prior block, the median |m|/s of its weights: below 1 the data say little about them."""
    if guide is None:
        return {}
    ratios: dict[str, list[Tensor]] = {}
    for site in guide.sites:
        loc, scale = guide.posterior(site)
        ratios.setdefault(blocks[site], []).append((loc.abs() / scale).flatten())
    return {f"signal_to_noise_{block}": float(torch.cat(parts).median()) for block, parts in ratios.items()}
