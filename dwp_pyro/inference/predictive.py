"""The posterior predictive of a scan, as streaming moments over weight samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor

from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.metrics.overlap import pairwise_dice
from dwp_pyro.models.likelihoods import region_probability
from dwp_pyro.models.segmentation import autocast
from dwp_pyro.runtime.errors import RunError

__all__ = ["PredictiveMoments", "binary_entropy", "posterior_mean_probability", "posterior_predictive"]

#: Windows per batch on a CPU, where convolutions of one small window are several times slower.
_CPU_WINDOWS = 4
#: Elements of one feature map of a batch of windows on a GPU; with fewer, the GPU waits for the CPU.
_GPU_BATCH_SIZE = 2**26

_Weights = dict[str, Tensor]

_HALF = Decision()


@dataclass(frozen=True)
class PredictiveMoments:
    """Moments of the posterior predictive, per region and voxel [R, X, Y, Z], and of the whole scan.

    Interpolate `probability` and `mutual_information`, and compute the entropy after that: entropy is concave, so that
    an interpolated expected entropy would make sharp borders look like disagreement.

    Args:
        probability: p̄, mean probability of a region.
        expected_entropy: E H[p] in nats, mean entropy of the samples.
        pairwise_dice: Mean Dice of each region over all pairs of the samples' segmentations, which the threshold of the
            decision makes; NaN for a single sample.
    """

    probability: Tensor
    expected_entropy: Tensor
    pairwise_dice: tuple[float, ...]

    @property
    def entropy(self) -> Tensor:
        """Predictive entropy H[p̄] in nats."""
        return binary_entropy(self.probability)

    @property
    def mutual_information(self) -> Tensor:
        """Mutual information H[p̄] − E H[p] of prediction and weights in nats (epistemic uncertainty).

        With mirrored passes, of prediction, weights and mirroring.
        """
        # Rounding can make it slightly negative.
        return (self.entropy - self.expected_entropy).clamp_min(0)


@torch.no_grad()
def posterior_predictive(
    posterior: Posterior,
    image: Tensor,
    seeds: Sequence[int] | None,
    overlap: float = 0.25,
    precision: str = "float32",
    advance: Callable[[], None] = lambda: None,
    brain_mask: Tensor | None = None,
    decision: Decision = _HALF,
) -> PredictiveMoments:
    """Return the moments over weight samples, each of which is used in all windows of the image.

    Memory grows by one byte per voxel of the brain and region with each sample; the maps are running sums.

    Args:
        posterior: Posterior, on the image's device.
        image: Image [channels, X, Y, Z].
        seeds: Seed of each weight sample; the members of the posterior take turns. None for one pass per member and
            mirroring with kernels at their means, a fast approximation where members differ more than their samples.
        overlap: Overlap of neighboring windows, as a fraction of a window.
        precision: Precision of the network; see `autocast`.
        advance: Function called after each sample.
        brain_mask: Voxels in which `pairwise_dice` is computed, bool [X, Y, Z]; None for all.
        decision: Its mirrorings of the image, with which the passes of each member take turns, and its threshold.

    Raises:
        RunError: if the network's output is not finite.
    """
    shape = (len(posterior.network_config.regions), *image.shape[1:])
    total, entropies = (torch.zeros(shape, device=image.device) for _ in range(2))
    members = len(posterior.members)
    flips = decision.flips
    passes = members * len(flips) if seeds is None else len(seeds)
    segmentations: list[NDArray[np.bool_]] = []

    def weights(number: int) -> dict[str, Tensor]:
        member = number % members
        return posterior.means(member) if seeds is None else posterior.draw(seeds[number], member)

    def mirrored(volume: Tensor, number: int) -> Tensor:
        return volume.flip([1 + axis for axis in flips[number // members % len(flips)]])

    with ThreadPoolExecutor(1) as executor:
        upcoming = _draw_ahead(executor, partial(weights, 0), image.device)
        for number in range(passes):
            current = upcoming()
            if number + 1 < passes:
                upcoming = _draw_ahead(executor, partial(weights, number + 1), image.device)
            probability = _probability(posterior, mirrored(image, number), current, overlap, precision)
            probability = mirrored(probability, number)
            if not probability.sum().isfinite():
                raise RunError("the network's output is NaN or infinite, its weights are too large; train it again")
            total += probability
            entropies += binary_entropy(probability)
            counted = (probability.flatten(1) if brain_mask is None else probability[:, brain_mask]).cpu().numpy()
            masks = decision.above_threshold(counted[..., None, None], posterior.network_config.activation)
            segmentations.append(masks[..., 0, 0])
            del probability, counted  # free their memory before the next pass
            advance()
    agreement = tuple(pairwise_dice(of_region) for of_region in zip(*segmentations, strict=True))
    return PredictiveMoments(total.div_(passes), entropies.div_(passes), agreement)


@torch.no_grad()
def posterior_mean_probability(posterior: Posterior, image: Tensor) -> Tensor:
    """Return the regions' probabilities with kernels at their posterior means, averaged over the members.

    Image [channels, X, Y, Z] → [R, X, Y, Z].
    """
    members = range(len(posterior.members))
    total = sum(_probability(posterior, image, posterior.means(member)) for member in members)
    return torch.as_tensor(total) / len(members)


def _draw_ahead(executor: Executor, draw: Callable[[], _Weights], device: torch.device) -> Callable[[], _Weights]:
    """Draw in a thread, so that a GPU does not wait; on a CPU, its own OpenMP team would slow the passes."""
    return draw if device.type == "cpu" else executor.submit(draw).result


def _probability(
    posterior: Posterior, image: Tensor, weights: dict[str, Tensor], overlap: float = 0.25, precision: str = "float32"
) -> Tensor:
    def window_probability(window: Tensor) -> Tensor:
        with autocast(precision, window.device):
            logits = posterior.logits(window, weights)
        return region_probability(logits.float(), posterior.network_config.activation)

    patch, windows = posterior.network_config.patch, _CPU_WINDOWS
    if image.device.type != "cpu":
        windows = max(1, _GPU_BATCH_SIZE // (posterior.network_config.widths[0] * math.prod(patch)))
    result = sliding_window_inference(image[None], patch, windows, window_probability, overlap, mode="gaussian")
    assert isinstance(result, Tensor)
    return result[0]


def binary_entropy(probability: Tensor) -> Tensor:
    """Return the entropy of Bernoulli variables in nats."""
    probability = probability.clamp(0, 1)  # a mean of ones may round to more
    entropy: Tensor = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return entropy
