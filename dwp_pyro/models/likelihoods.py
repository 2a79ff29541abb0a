"""Likelihoods of a segmentation: what a network's outputs say about labels."""

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

#: "softmax" over background and regions, which exclude each other; or a "sigmoid" per region, which may overlap.
ACTIVATIONS = ("softmax", "sigmoid")

_SMOOTHING = 6e-5  # of the brain in a patch: two voxels of 32³


def choose_activation(regions: Iterable[Set[int]]) -> str:
    """ "softmax" if no label value belongs to two regions, else "sigmoid".

    Example:
        >>> from dwp_pyro.models.likelihoods import choose_activation
        >>> choose_activation([{1}, {2}]), choose_activation([{1, 2, 4}, {1, 4}])
        ('softmax', 'sigmoid')
    """
    disjoint = all(one.isdisjoint(other) for one, other in combinations(regions, 2))
    return "softmax" if disjoint else "sigmoid"


def region_probability(logits: Tensor, activation: str) -> Tensor:
    """Logits [B, 1 + R, X, Y, Z], background first → probability of each region, [B, R, X, Y, Z].

    A sigmoid takes the difference of a region's logit and that of the background, so that for one region it is the
    softmax of the two.
    """
    return logits.softmax(1)[:, 1:] if activation == "softmax" else _region_logits(logits).sigmoid()


def region_masks(probability: Tensor, activation: str) -> Tensor:
    """Probability [R, X, Y, Z] → mask of each region, bool [R, X, Y, Z].

    "softmax": the most probable class, the background being one of them; "sigmoid": where it is above 1/2.
    """
    if activation == "sigmoid":
        return probability > 0.5
    highest, best = probability.max(0)
    numbers = torch.arange(len(probability), device=probability.device)[:, None, None, None]
    return (numbers == best) & (highest > 1 - probability.sum(0))


def _region_logits(logits: Tensor) -> Tensor:
    return logits[:, 1:] - logits[:, :1]


def categorical(logits: Tensor, label: Tensor, brain: Tensor, activation: str = "sigmoid") -> Tensor:
    """Mean over the brain voxels of a patch of log p(y|x), in nats; [B]. With "sigmoid" it is summed over the regions.

    Args:
        logits: [B, 1 + R, X, Y, Z], background first.
        label: [B, R, X, Y, Z], 1 in the region and 0 outside.
        brain: [B, 1, X, Y, Z], 1 where a voxel counts and 0 elsewhere.
        activation: One of `ACTIVATIONS`.
    """
    return -_mean_cross_entropy(logits, label, brain, activation).sum(1)


def dice_ce(
    logits: Tensor, label: Tensor, brain: Tensor, activation: str = "sigmoid", dice_weight: float = 0.5
) -> Tensor:
    """−(a·Dice loss + (1 − a)·mean cross-entropy) of a patch, a the `dice_weight`; [B].

    A generalized (Gibbs) likelihood; Kuzina et al. 2019 have a = 0.99. The Dice loss is 1 − soft Dice over brain
    voxels, its mean over the regions; so is the cross-entropy's with "sigmoid". Other arguments as for `categorical`.
    """
    probability = region_probability(logits, activation) * brain
    label = label.to(probability.dtype)
    voxels = (2, 3, 4)
    # Fractions of the brain, not voxels: the same volume has the same Dice at every resolution.
    size = brain.sum(voxels).clamp_min(1)
    overlap = (probability * label).sum(voxels) / size
    total = (probability.sum(voxels) + (label * brain).sum(voxels)) / size
    # A case without foreground then has the Dice 1 for an empty prediction.
    dice = (2 * overlap + _SMOOTHING) / (total + _SMOOTHING)
    cross_entropy = _mean_cross_entropy(logits, label, brain, activation)
    return -(dice_weight * (1 - dice).mean(1) + (1 - dice_weight) * cross_entropy.mean(1))


def _mean_cross_entropy(logits: Tensor, label: Tensor, brain: Tensor, activation: str) -> Tensor:
    """Cross-entropy, its mean over the brain voxels: of each region [B, R] with "sigmoid", [B, 1] with "softmax"."""
    label = label.to(logits.dtype)
    if activation == "softmax":
        target = torch.cat([1 - label.sum(1, keepdim=True), label], 1)
        loss = -(target * logits.log_softmax(1)).sum(1, keepdim=True)
    else:
        loss = F.binary_cross_entropy_with_logits(_region_logits(logits), label, reduction="none")
    return (loss * brain).flatten(2).sum(2) / brain.flatten(1).sum(1, keepdim=True).clamp_min(1)


#: Name → log-likelihood of each patch of a batch, per observation.
LIKELIHOODS: dict[str, Callable[..., Tensor]] = {"dice-ce": dice_ce, "categorical": categorical}
