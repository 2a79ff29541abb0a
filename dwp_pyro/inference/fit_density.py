"""Fits densities to the kernels of a block, and measures them on kernels they have not seen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from dwp_pyro.distributions.gaussian_fit import fit_gaussian
from dwp_pyro.distributions.kernel_density import KernelDensity, KernelGaussian
from dwp_pyro.distributions.kernel_flow import KernelFlow
from dwp_pyro.distributions.kernel_mixture import KernelMixture
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.errors import PriorError
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.finite_steps import MOST_IN_A_ROW, FiniteSteps

__all__ = ["BlockKernels", "FitSettings", "fit_density", "score_batches", "score_kernels"]

_BATCH = 512
_LEARNING_RATE = 2e-3
_WARM_UP = 0.3  # of the steps
_CHECKS = 40  # evaluations on kernels for choosing in a fit
_MOST = 10_000  # kernels that are enough to choose or to measure on
_CHUNK = 25_000  # kernels × samples evaluated at once: what a processor's cache holds

_MIXTURE_KERNELS = 30_000  # that are enough to fit a mixture to
_COMPONENTS = (2, 4, 8, 16, 32)
_SWEEPS = 60  # of expectation maximisation
_MIN_VARIANCE = 1e-6  # of a standardised kernel's weight, times D

_DensityT = TypeVar("_DensityT", bound=KernelDensity)


@dataclass(frozen=True)
class BlockKernels:
    """The kernels of a block, and where they came from.

    Args:
        kernels: [n, k₁, …, k_d], n ≥ 2.
        bootstraps: [n] integers: the source network of each kernel.
        identities: [n] integers: the kernel that each is, or is a snapshot of.
    """

    kernels: Tensor
    bootstraps: Tensor
    identities: Tensor

    def __getitem__(self, chosen: Tensor) -> BlockKernels:
        return BlockKernels(self.kernels[chosen], self.bootstraps[chosen], self.identities[chosen])

    def __len__(self) -> int:
        return len(self.kernels)


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    Args:
        latent_size: of a VAE.
        hidden: widths of the hidden layers of a VAE.
        steps: the most optimisation steps of a VAE or a flow.
        seed: of the initialisation, the minibatches and the noise.
    """

    latent_size: int
    hidden: Sequence[int]
    steps: int
    seed: int


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small are faster on one core than split over several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def fit_density(
    family: str, block: BlockKernels, settings: FitSettings, advance: Callable[[], None] = lambda: None
) -> tuple[KernelDensity, dict[str, float]]:
    """Fit a density of a family: a Gaussian, a mixture and a flow by likelihood, a VAE by its one-sample bound.

    The last bootstrap is held out to measure, the one before it to choose (the step at which to stop, the
    number of components); with two bootstraps the last does both, and its figure is a little too good; with
    one bootstrap, a random fifth of the kernels does. The density is then fitted again to all, as chosen.

    Args:
        family: "gaussian", "mixture", "flow" or "dwp".
        block: the kernels.
        settings: of the fit.
        advance: called `2 * settings.steps` times in all.

    Returns:
        The density, in evaluation mode and frozen, and its held-out nats per kernel beside those of its
        controls; see `score_kernels`.

    Raises:
        PriorError: if the loss or its gradient stays NaN or infinite.
    """
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    seen, choosing, measuring = _hold_out(block)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        advance()

    trial: KernelDensity
    final: KernelDensity
    if family == "gaussian":
        trial, final = _gaussian(seen), _gaussian(block)
    elif family == "mixture":
        trial, final = _fit_mixture(seen, choosing, block)
    else:
        trial, final = (_vae(part, settings) if family == "dwp" else _flow(part) for part in (seen, block))
        trial, best_step = _descend(trial, seen.kernels, settings.steps, count, choosing)
        final, _ = _descend(final, block.kernels, best_step, count, None, schedule=settings.steps)
    for _ in range(2 * settings.steps - calls):
        advance()
    for density in (trial, final):
        density.eval().requires_grad_(False)
    return final, score_kernels(trial, measuring)


@torch.no_grad()
def score_kernels(
    density: KernelDensity, kernels: Tensor, samples: int = 500, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean log-density of kernels, in nats a kernel in the kernels' raw units.

    Args:
        density: a fitted one.
        kernels: [n, k₁, …, k_d].
        samples: K of the importance-weighted bound of a VAE, on each kernel.
        advance: called after each kernel batch; see `score_batches`.

    Returns:
        "prior": the density, or the VAE's bound on it; "standard_normal": N(0, 1) on each weight;
        "isotropic" and "full_gaussian": independent weights about 0, and the full-covariance Gaussian, as
        spread as the kernels that the density was fitted to.
    """
    total = 0.0
    for chunk in kernels.split(_chunk(samples)):
        total += float(density.log_prob_estimate(chunk, samples).double().sum())
        advance()
    flat = kernels.flatten(1)
    gaussian = MultivariateNormal(density.loc, scale_tril=density.scale_tril)
    return {
        "prior": total / len(kernels),
        "standard_normal": float(Normal(0.0, 1.0).log_prob(flat).double().sum(1).mean()),
        "isotropic": float(Normal(0.0, density.root_mean_square()).log_prob(flat).double().sum(1).mean()),
        "full_gaussian": float(gaussian.log_prob(flat).double().mean()),
    }


def score_batches(kernels: int, samples: int) -> int:
    """The batches in which `score_kernels` takes so many kernels."""
    return math.ceil(kernels / _chunk(samples))


def _chunk(samples: int) -> int:
    return max(1, _CHUNK // samples)


def _hold_out(block: BlockKernels) -> tuple[BlockKernels, Tensor, Tensor]:
    """What to fit, the kernels to choose on, and those to measure on."""
    bootstraps = block.bootstraps.unique()
    if len(bootstraps) > 1:
        measured = block.bootstraps == bootstraps[-1]
        chosen = block.bootstraps == bootstraps[max(-2, -len(bootstraps) + 1)]
    else:
        distinct = block.identities.unique()
        some = distinct[torch.randperm(len(distinct))[: max(1, len(distinct) // 5)]]
        measured = chosen = torch.isin(block.identities, some)
    parts = (block.kernels[where] for where in (chosen, measured))
    choosing, measuring = (part[torch.randperm(len(part))[:_MOST]] for part in parts)
    return block[~(chosen | measured)], choosing, measuring


def _standardised(density: _DensityT, block: BlockKernels) -> _DensityT:
    gaussian = fit_gaussian(block.kernels, block.identities)
    density.standardise_by(gaussian.loc, gaussian.scale_tril)
    return density


def _gaussian(block: BlockKernels) -> KernelGaussian:
    return _standardised(KernelGaussian(block.kernels.shape[1:]), block)


def _vae(block: BlockKernels, settings: FitSettings) -> KernelVAE:
    return _standardised(KernelVAE(block.kernels.shape[1:], settings.latent_size, settings.hidden), block)


def _flow(block: BlockKernels) -> KernelFlow:
    return _standardised(KernelFlow(block.kernels.shape[1:]), block)


@torch.no_grad()
def _fit_mixture(seen: BlockKernels, choosing: Tensor, block: BlockKernels) -> tuple[KernelMixture, KernelMixture]:
    """Mixtures of the best number of components, fitted to `seen` and to the whole block."""
    best = _mixture(seen, 1)
    for components in _COMPONENTS:
        if components * 2 * best.kernel_shape.numel() > len(seen):
            break
        trial = _mixture(seen, components)
        if trial.log_prob_estimate(choosing).mean() > best.log_prob_estimate(choosing).mean():
            best = trial
    return best, _mixture(block, len(best.log_weights))


def _mixture(block: BlockKernels, components: int) -> KernelMixture:
    """Expectation maximisation; each covariance is drawn towards that of the whole block."""
    mixture = _standardised(KernelMixture(block.kernels.shape[1:], components), block)
    if components == 1:
        return mixture
    u = mixture.standardise(block.kernels[torch.randperm(len(block))[:_MIXTURE_KERNELS]])
    size = u.shape[1]
    # Kernels differ above all in their norm: components of several widths are a start that tells them apart.
    rank = u.square().sum(1).argsort().argsort()
    responsibility = nn.functional.one_hot(rank * components // len(u), components).float()
    for _ in range(_SWEEPS):
        count = responsibility.sum(0)
        means = responsibility.T @ u / (count[:, None] + 1)
        for component in range(components):
            weighted = (u - means[component]) * responsibility[:, component, None].sqrt()
            scatter = weighted.T @ weighted
            # As if each component had D kernels more, as spread as its own and isotropic. Those of the whole block
            # would widen a component of near-zero kernels a thousandfold.
            spread = scatter.trace() / size / count[component].clamp_min(1)
            covariance = (scatter + (size * spread + _MIN_VARIANCE) * torch.eye(size)) / (count[component] + size)
            root = torch.linalg.cholesky(covariance)
            mixture.whitenings[component] = torch.linalg.solve_triangular(root, torch.eye(size), upper=False)
        mixture.means.copy_(means)
        mixture.log_weights.copy_(((count + 1) / (count + 1).sum()).log())
        responsibility = mixture.component_log_prob(u).softmax(-1)
    return mixture


def _descend(
    density: _DensityT,
    kernels: Tensor,
    steps: int,
    advance: Callable[[], None],
    choosing: Tensor | None,
    schedule: int | None = None,
) -> tuple[_DensityT, int]:
    """Fit by gradient for `steps` of a cosine schedule; with `choosing`, return its best moment on them and that step.

    Step 0 is the Gaussian that the density starts at.
    """
    schedule = schedule or steps
    optimizer = torch.optim.Adam(density.parameters(), lr=_LEARNING_RATE, fused=True)
    take_step = FiniteSteps(optimizer)
    best, best_step, best_score = copy.deepcopy(density.state_dict()), 0, -math.inf
    check_every = max(1, steps // _CHECKS)
    for step in range(steps + 1):
        if choosing is not None and (step % check_every == 0 or step == steps):
            with torch.no_grad():
                score = float(density.log_prob_estimate(choosing, 4).mean())
            if score > best_score:
                best, best_step, best_score = copy.deepcopy(density.state_dict()), step, score
        if step == steps:
            break
        if step == 0 and isinstance(density, KernelVAE):
            # Both networks at 0 are a saddle point: no gradient tells either to use z. From here the encoder
            # says something about w.
            output = density.encoder[-1]
            assert isinstance(output, nn.Linear)
            output.reset_parameters()
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * _LEARNING_RATE * (1 + math.cos(math.pi * step / schedule))
        batch = kernels[torch.randint(len(kernels), (min(_BATCH, len(kernels)),))]
        loss = _loss(density, batch, step / schedule)
        loss.backward()
        take_step(loss.detach())
        if take_step.stuck:
            raise PriorError(
                f"kernel prior: the fit's loss was not finite in {MOST_IN_A_ROW} steps in a row, of kernels between "
                f"{float(kernels.min()):.2g} and {float(kernels.max()):.2g}; leave out those of networks that "
                "diverged, or fit with --family gaussian"
            )
        advance()
    if choosing is not None:
        density.load_state_dict(best)
    return density, best_step if choosing is not None else steps


def _loss(density: KernelDensity, batch: Tensor, part: float) -> Tensor:
    """Mean negative log-density; of a VAE, the negative bound, at a part of the schedule from 0 to 1."""
    if not isinstance(density, KernelVAE):
        return -density.log_prob_estimate(batch).mean()
    log_likelihood, log_ratio = density.log_weights(batch, torch.randn(1, len(batch), density.latent_size))
    # The KL of z rises from a tenth of its weight: at full weight from the start, z is never taken up.
    weight = min(1.0, 0.1 + 0.9 * part / _WARM_UP)
    return -(log_likelihood + weight * log_ratio).mean()
