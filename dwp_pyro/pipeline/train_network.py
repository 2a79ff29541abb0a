"""Trains one network, Bayesian or not: what the source stage and every arm on the target share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dwp_pyro.config import TrainingSettings
from dwp_pyro.data.transforms import Patches
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.inference.posterior_predictive import posterior_mean_probability
from dwp_pyro.inference.svi import Plan, optimise, steps_done
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import PRIOR_BLOCKS, ResidualUNet3d, in_block
from dwp_pyro.pipeline.metrics_log import MetricsLog, Track
from dwp_pyro.pipeline.training_data import TrainingData

__all__ = ["Program", "network_card", "train_network", "validation_dice"]


def network_card(settings: TrainingSettings, data: TrainingData) -> NetworkCard:
    """The form of a network for these settings and data."""
    a, b, c, d = settings.widths
    return NetworkCard(
        modalities=settings.modality,
        widths=(a, b, c, d),
        short=settings.short,
        layout=data.layout.name,
        region=data.region,
        spacing=settings.spacing,
        patch=data.patch,
    )


class Program(NamedTuple):
    """What is trained: a network, bare or made a program by `bayesianize`; the guide and learned prior of its sites.

    `pull` is the weight of L2-SP, towards the weights that the network has at its start.
    """

    network: ResidualUNet3d
    guide: MeanFieldNormal | None = None
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
    network, guide, kernel_prior, pull = program
    model = SegmentationModel(network, settings.likelihood, len(data.train), kernel_prior, pull, settings.precision)
    model.to(device)
    if guide is not None:
        guide.to(device)
    patches = Patches(data.train, data.patch, plan.seed, plan.steps * settings.batch_size)

    def posterior() -> Posterior:
        # A plain copy of the deterministic weights; the sites' weights come from the guide.
        plain = card.network().to(device)
        plain.load_state_dict(network.state_dict(), strict=guide is None)
        return Posterior(card, [Member(plain, guide)])

    def validate() -> dict[str, float]:
        figures = signal_to_noise(guide)
        if data.validation:
            figures["validation_dice"] = validation_dice(posterior(), data, device)
        return figures

    with MetricsLog(run, stage, steps_done(checkpoint), track) as log:
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
    """Mean Dice of the region over the validation cases, on the network's grid, kernels at their means.

    A case with an empty region counts 1 for an empty prediction and 0 for any other.
    """
    scores = []
    for example in data.validation:
        assert example.label is not None
        predicted = posterior_mean_probability(posterior, example.image.as_tensor().to(device)) > 0.5
        predicted &= example.brain.as_tensor()[0].to(device) > 0
        truth = example.label.as_tensor()[0].to(device) > 0
        total = int(predicted.sum() + truth.sum())
        scores.append(2 * int((predicted & truth).sum()) / total if total else 1.0)
    return sum(scores) / len(scores)


@torch.no_grad()
def signal_to_noise(guide: MeanFieldNormal | None) -> dict[str, float]:
    """For each prior block, the median |m|/s of its weights: below 1 the data say little about them."""
    figures = {}
    for block in PRIOR_BLOCKS if guide is not None else ():
        assert guide is not None
        ratios = [
            (loc.abs() / scale).flatten()
            for site in guide.sites
            if in_block(site, block)
            for loc, scale in [guide.posterior(site)]
        ]
        if ratios:
            figures[f"signal_to_noise_{block}"] = float(torch.cat(ratios).median())
    return figures
