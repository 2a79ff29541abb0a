"""Choice of the decision from validation cases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.data.preprocessing import Example
from dwp_pyro.inference.decision import THRESHOLDS, Decision, remove_small_components
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.inference.predictive import posterior_predictive
from dwp_pyro.inference.schedule import step_seed
from dwp_pyro.metrics.overlap import mean_dice
from dwp_pyro.metrics.summary import patient_means
from dwp_pyro.runtime.progress import progress
from dwp_pyro.training.training_data import TrainingData

__all__ = ["choose_decision", "predict_example", "volume_lost"]

_logger = logging.getLogger(__name__)

_PASSES = 2  # per member, at least
_MIN_MASSES = (0.0, 0.1, 0.25, 0.5)
#: Fraction of the annotated volume that removing small components may cost: a disease with several foci keeps them.
_MAX_LOST = 0.01
#: Standard deviation over patients of the gain in Dice, where a single patient does not tell it.
_GAIN_SPREAD = 0.1


def choose_decision(posterior: Posterior, data: TrainingData, mirror: Sequence[str], device: torch.device) -> Decision:
    """Return the decision with the highest mean Dice of the validation patients, on the network's grid.

    The choice is between the thresholds, passes with and without mirroring, and a few minimum masses: those that, as a
    filter of the training labels, remove at most 1 % of the volume of a case's worst region, on average over patients.
    The threshold of highest expected Dice is right if probabilities are; 1/2 must be better by a standard error over
    the patients, of which there are few (by 0.1 with one patient), or equal. Without validation cases, the largest
    minimum mass up to 1/4 is chosen, with the threshold 1/2 and no mirroring.

    The posterior is on `device`; `mirror` holds the axes along which training patches were mirrored, or "none".
    """
    labels = {example.id: example.label.numpy() > 0 for example in data.train if example.label is not None}
    masses = [mass for mass in _MIN_MASSES if volume_lost(labels, data.patients, mass) <= _MAX_LOST]
    if not data.validation:
        return Decision(min_mass=max(mass for mass in masses if mass <= 0.25))
    axes = tuple(axis for axis in mirror if axis != "none")
    mirrors = ((), axes) if axes else ((),)
    candidates = [Decision(*fields) for fields in product(THRESHOLDS, masses, mirrors)]
    masks = posterior.network_config.masks
    predictions: list[tuple[str, dict[tuple[str, ...], NDArray[np.float32]], NDArray[np.bool_]]] = []
    # The same with and without mirroring, so that the number of weight samples favors neither.
    passes = max(_PASSES, len(Decision(mirror=axes).flips))
    total = len(mirrors) * passes * len(posterior.members) * len(data.validation)
    with progress("choosing the decision", total) as advance:
        for example in data.validation:
            assert example.label is not None
            label = (example.label.numpy() > 0) & (example.brain_mask.numpy() == 1)
            of_mirror = {
                axes: predict_example(posterior, example, axes, device, passes, partial(advance, ""))
                for axes in mirrors
            }
            predictions.append((example.id, of_mirror, label))
    # An empty prediction scores 1 where a case has no region.
    counted = [each for each in predictions if each[2].any()] or predictions
    dice = {}
    for decision in candidates:
        of_case = {
            case: {"dice": mean_dice([(masks(of_mirror[decision.mirror], decision, None), label)])}
            for case, of_mirror, label in counted
        }
        dice[decision] = np.array([row["dice"] for row in patient_means(of_case, data.patients)])
    half, expected = (
        max((each for each in candidates if each.threshold == threshold), key=lambda each: float(dice[each].mean()))
        for threshold in THRESHOLDS
    )
    gain = dice[half] - dice[expected]
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else _GAIN_SPREAD
    best = half if gain.mean() >= error or not gain.any() else expected
    found, half_alone = dice[best].mean(), dice[Decision()].mean()
    _logger.info("decision: %s; validation Dice %.3f, of probability above 1/2 alone %.3f", best, found, half_alone)
    return best


def predict_example(
    posterior: Posterior,
    example: Example,
    mirror: tuple[str, ...],
    device: torch.device,
    passes: int = _PASSES,
    advance: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Return the mean probability [R, X, Y, Z] of a few passes per member; 0 where voxels do not count.

    `mirror` is that of a `Decision`; `passes` is the number per member, at least that of the mirrorings.

    Raises:
        RunError: if the output of the network is NaN or infinite.
    """
    image, decision = example.image.as_tensor().to(device), Decision(mirror=mirror)
    seeds = [step_seed(0, n) for n in range(len(posterior.members) * max(passes, len(decision.flips)))]
    moments = posterior_predictive(posterior, image, seeds, advance=advance, decision=decision)
    probability: NDArray[np.float32] = moments.probability.cpu().numpy() * (example.brain_mask.numpy() == 1)
    return probability


def volume_lost(labels: Mapping[str, NDArray[np.bool_]], patients: Mapping[str, str], min_mass: float) -> float:
    """Return the fraction of the volume that `remove_small_components` removes from labels, the mean over patients.

    Of the regions of a case that with the largest fraction counts, of the cases of a patient their mean; cases without
    any region are skipped.

    Args:
        labels: Case → masks [R, X, Y, Z].
        patients: Case → patient.
        min_mass: Argument of `remove_small_components`.
    """

    def lost(mask: NDArray[np.bool_]) -> float:
        return 1 - float(remove_small_components(mask, mask.astype(np.float32), min_mass).sum() / mask.sum())

    of_case = {
        case: {"lost": max(lost(mask) for mask in label if mask.any())} for case, label in labels.items() if label.any()
    }
    return float(np.mean([row["lost"] for row in patient_means(of_case, patients)])) if of_case else 0.0
