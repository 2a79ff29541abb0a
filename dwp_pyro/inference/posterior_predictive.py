"""The posterior predictive of a scan, as streaming moments over weight samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.metrics.overlap import PairwiseDice
from dwp_pyro.models.likelihoods import region_masks, region_probability
from dwp_pyro.models.segmentation import in_precision

__all__ = ["Moments", "binary_entropy", "posterior_mean_probability", "posterior_predictive"]

_WINDOWS = 4  # at once on a CPU: PyTorch's convolutions are several times slower there on a single small window
_NUMBERS_OF_A_GPU = 2**26  # in one feature map of windows at once: with fewer a GPU waits for the processor


@dataclass(frozen=True)
class Moments:
    """Moments of the posterior predictive, per region and voxel [R, X, Y, Z], and of the whole scan.

    `probability` and `expected_entropy` are means, and can be interpolated; entropies are formed after that.

    Args:
        probability: p̄, mean probability of a region.
        expected_entropy: E H[p] in nats, mean entropy of the samples.
        agreement: Mean Dice of each region over all pairs of the passes' own segmentations; NaN of a single pass.
    """

    probability: Tensor
    expected_entropy: Tensor
    agreement: tuple[float, ...]

    @property
    def entropy(self) -> Tensor:
        """H[p̄], predictive entropy in nats."""
        return binary_entropy(self.probability)

    @property
    def mutual_information(self) -> Tensor:
        """H[p̄] − E H[p] in nats, what the weights disagree on (epistemic)."""
        # Jensen's inequality makes it positive; rounding may not.
        return (self.entropy - self.expected_entropy).clamp_min(0)


@torch.no_grad()
def posterior_predictive(
    posterior: Posterior,
    image: Tensor,
    seeds: Sequence[int] | None,
    overlap: float = 0.25,
    precision: str = "float32",
    advance: Callable[[], None] = lambda: None,
    brain: Tensor | None = None,
) -> Moments:
    """One coherent pass over the whole image for each weight sample: the same kernels in every window.

    Memory hardly grows with the number of samples: two running sums are kept, and of each segmentation a bit a voxel of
    the brain.

    Args:
        posterior: on the image's device.
        image: [channels, X, Y, Z].
        seeds: one a weight sample; the members of the posterior take turns. None for one pass a member, its kernels at
            their means: of a mixture, whose members disagree more than their samples, a quick near-equal.
        overlap: of neighbouring windows, as a part of a window.
        precision: see `in_precision`.
        advance: called after each sample.
        brain: bool [X, Y, Z], where segmentations are compared with each other; None for everywhere.

    Raises:
        FloatingPointError: if the network's output is not finite.
    """
    shape = (len(posterior.card.regions), *image.shape[1:])
    total, entropies = (torch.zeros(shape, device=image.device) for _ in range(2))
    passes = len(posterior.members) if seeds is None else len(seeds)
    segmentations = [PairwiseDice() for _ in posterior.card.regions]

    def weights(number: int) -> dict[str, Tensor]:
        member = number % len(posterior.members)
        return posterior.means(member) if seeds is None else posterior.draw(seeds[number], member)

    def compare(segmented: Tensor) -> None:
        for masks, mask in zip(segmentations, segmented.cpu().numpy(), strict=True):
            masks.add(mask)

    # Beside the passes, or a GPU would wait: noise is drawn on the CPU, and segmentations are compared there.
    with _AtOnce() if image.device.type == "cpu" else ThreadPoolExecutor(1) as beside:
        drawn, compared = beside.submit(weights, 0), beside.submit(lambda: None)
        for number in range(passes):
            now = drawn.result()
            if number + 1 < passes:
                drawn = beside.submit(weights, number + 1)
            probability = _probability(posterior, image, now, overlap, precision)
            if not probability.sum().isfinite():
                raise FloatingPointError("the network's output is NaN")
            total += probability
            entropies += binary_entropy(probability)
            segmented = region_masks(probability, posterior.card.activation)
            del probability  # or it would lie beside that of the next sample
            if brain is not None:
                segmented = segmented[:, brain]
            advance()
            compared.result()
            compared = beside.submit(compare, segmented)
        compared.result()
    agreement = tuple(masks.mean() for masks in segmentations)
    return Moments(total.div_(passes), entropies.div_(passes), agreement)


@torch.no_grad()
def posterior_mean_probability(posterior: Posterior, image: Tensor, overlap: float = 0.25) -> Tensor:
    """The regions' probabilities, every kernel at its posterior mean, averaged over the members.

    Image [channels, X, Y, Z] → [R, X, Y, Z].
    """
    members = range(len(posterior.members))
    total = sum(_probability(posterior, image, posterior.means(member), overlap) for member in members)
    return torch.as_tensor(total) / len(members)


class _AtOnce(Executor):
    """Works where it is asked to. A thread that computes beside a pass on a CPU has helpers of its own, so many in all
    that those of the pass sleep sooner between two operations, and a pass takes some per cent longer.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _probability(
    posterior: Posterior, image: Tensor, weights: dict[str, Tensor], overlap: float, precision: str = "float32"
) -> Tensor:
    keep_freed_memory()

    def window_probability(window: Tensor) -> Tensor:
        with in_precision(precision, window.device):
            logits = posterior.logits(window, weights)
        return region_probability(logits.float(), posterior.card.activation)

    patch, windows = posterior.card.patch, _WINDOWS
    if image.device.type != "cpu":
        windows = max(1, _NUMBERS_OF_A_GPU // (posterior.card.widths[0] * math.prod(patch)))
    result = sliding_window_inference(image[None], patch, windows, window_probability, overlap, mode="gaussian")
    assert isinstance(result, Tensor)
    return result[0]


def binary_entropy(probability: Tensor) -> Tensor:
    """Of a Bernoulli variable, in nats; a fifth of the time of PyTorch's cross-entropy with itself."""
    tiny = torch.finfo(probability.dtype).tiny
    other = 1 - probability
    negative = probability.clamp_min(tiny).log_().mul_(probability)
    return 0 - negative.addcmul_(other.clamp_min(tiny).log_(), other)
