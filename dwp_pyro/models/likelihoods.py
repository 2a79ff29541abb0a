"""Likelihoods of a segmentation given a network's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ACTIVATIONS",
    "LIKELIHOODS",
    "categorical",
    "choose_activation",
    "dice_ce",
    "region_masks",
    "region_probability",
]

#: "softmax" over background and mutually exclusive regions, or a "sigmoid" per region, for regions that may overlap.
ACTIVATIONS = ("softmax", "sigmoid")

_SMOOTHING = 6e-5  # fraction of a patch's brain voxels: two of 32³


def choose_activation(regions: Iterable[Set[int]]) -> str:
    """Return "softmax" if no label value belongs to two regions, else "sigmoid".

    Args:
        regions: Label values of each region.
    """
    disjoint = all(one.isdisjoint(other) for one, other in combinations(regions, 2))
    return "softmax" if disjoint else "sigmoid"


def region_probability(logits: Tensor, activation: str) -> Tensor:
    """Return the probability of each region, [B, R, X, Y, Z], of logits [B, 1 + R, X, Y, Z], background first.

    The sigmoid is applied to the difference of a region's logit and the background's: for one region it equals the
    softmax.
    """
    return logits.softmax(1)[:, 1:] if activation == "softmax" else _region_logits(logits).sigmoid()


def region_masks(probability: Tensor, activation: str) -> Tensor:
    """Return the mask of each region, bool [R, X, Y, Z], of probabilities [R, X, Y, Z].

    "softmax": the most probable class, background included; "sigmoid": probability above 1/2.
    """
    if activation == "sigmoid":
        return probability > 0.5
    highest, best = probability.max(0)
    numbers = torch.arange(len(probability), device=probability.device)[:, None, None, None]
    return (numbers == best) & (highest > 1 - probability.sum(0))


def _region_logits(logits: Tensor) -> Tensor:
    return logits[:, 1:] - logits[:, :1]


def categorical(logits: Tensor, label: Tensor, brain_mask: Tensor, activation: str = "sigmoid") -> Tensor:
    """Return log p(y|x) in nats, the mean over the brain voxels of each patch, [B]; "sigmoid" sums over regions.

    Args:
        logits: Logits, [B, 1 + R, X, Y, Z], background first.
        label: Masks of the regions, [B, R, X, Y, Z], 1 inside and 0 outside.
        brain_mask: Voxels that count, [B, 1, X, Y, Z], 1 inside and 0 outside.
        activation: One of `ACTIVATIONS`.
    """
    return -_mean_cross_entropy(logits, label, brain_mask, activation).sum(1)


def dice_ce(
    logits: Tensor, label: Tensor, brain_mask: Tensor, activation: str = "sigmoid", dice_weight: float = 0.5
) -> Tensor:
    """Return −(a·Dice loss + (1 − a)·mean cross-entropy) of each patch, [B], with a = `dice_weight`.

    A generalized (Gibbs) likelihood; Kuzina et al. 2019 use a = 0.99. The Dice loss is 1 − soft Dice over brain voxels,
    the mean over regions; the cross-entropy is the mean over regions with "sigmoid". Other arguments as for
    `categorical`.
    """
    probability = region_probability(logits, activation) * brain_mask
    label = label.to(probability.dtype)
    voxels = (2, 3, 4)
    # Fractions of the brain, not voxels: the same volume has the same Dice at every resolution.
    size = brain_mask.sum(voxels).clamp_min(1)
    overlap = (probability * label).sum(voxels) / size
    total = (probability.sum(voxels) + (label * brain_mask).sum(voxels)) / size
    # With smoothing, an empty prediction for a case without foreground has Dice 1.
    dice = (2 * overlap + _SMOOTHING) / (total + _SMOOTHING)
    cross_entropy = _mean_cross_entropy(logits, label, brain_mask, activation)
    return -(dice_weight * (1 - dice).mean(1) + (1 - dice_weight) * cross_entropy.mean(1))


def _mean_cross_entropy(logits: Tensor, label: Tensor, brain_mask: Tensor, activation: str) -> Tensor:
    """Return the mean cross-entropy over brain voxels: [B, R] with "sigmoid", [B, 1] with "softmax"."""
    label = label.to(logits.dtype)
    if activation == "softmax":
        target = torch.cat([1 - label.sum(1, keepdim=True), label], 1)
        loss = -(target * logits.log_softmax(1)).sum(1, keepdim=True)
    else:
        loss = F.binary_cross_entropy_with_logits(_region_logits(logits), label, reduction="none")
    return (loss * brain_mask).flatten(2).sum(2) / brain_mask.flatten(1).sum(1, keepdim=True).clamp_min(1)


#: Name → log-likelihood of each patch of a batch, per observation.
LIKELIHOODS: dict[str, Callable[..., Tensor]] = {"dice-ce": dice_ce, "categorical": categorical}
