"""Fits a density to the kernels of a block, and measures it on kernels it has not seen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from dwp_pyro.distributions.gaussian_fit import fit_gaussian
from dwp_pyro.distributions.kernel_vae import KernelVAE

__all__ = ["fit_kernel_vae", "score_batches", "score_kernels"]

_BATCH = 512
_LEARNING_RATE = 2e-3
_WARM_UP = 0.3  # of the steps
_CHECKS = 40  # evaluations on held-out kernels in a fit
_HELD_OUT = 10_000  # kernels that are enough to measure on
_CHUNK = 25_000  # kernels × samples evaluated at once: what a processor's cache holds


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
def fit_kernel_vae(
    kernels: Tensor,
    bootstraps: Tensor,
    identities: Tensor,
    *,
    latent_size: int,
    hidden: Sequence[int],
    steps: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[KernelVAE, dict[str, float]]:
    """Fit a `KernelVAE` by maximising its one-sample bound.

    The last bootstrap is held out to choose the step at which to stop and to measure; with one
    bootstrap, a random fifth of the kernels. The density is then fitted again to all, to the same step.

    Args:
        kernels: [n, k₁, …, k_d], n ≥ 2.
        bootstraps: [n] integers: the source network of each kernel.
        identities: [n] integers: the kernel that each is, or is a snapshot of.
        latent_size: of the VAE.
        hidden: widths of the VAE's hidden layers.
        steps: the most optimisation steps of a fit.
        seed: of the initialisation, the minibatches and the noise.
        advance: called `2 * steps` times in all.

    Returns:
        The VAE, in evaluation mode and frozen, and its held-out nats per kernel beside those of its
        controls; see `score_kernels`. The step having been chosen on the same kernels, the VAE's figure
        is a little too good; measure on kernels of another source to be strict.
    """
    torch.manual_seed(seed)
    if len(bootstraps.unique()) > 1:
        held_out = bootstraps == bootstraps.max()
    else:
        distinct = identities.unique()
        held_out = torch.isin(identities, distinct[torch.randperm(len(distinct))[: max(1, len(distinct) // 5)]])
    seen = ~held_out
    unseen = kernels[held_out]
    unseen = unseen[torch.randperm(len(unseen))[:_HELD_OUT]]
    trial, best_step = _fit(kernels[seen], identities[seen], latent_size, hidden, steps, advance, unseen)
    nats = score_kernels(trial, unseen)
    final, _ = _fit(kernels, identities, latent_size, hidden, best_step, advance, None, schedule=steps)
    for _ in range(steps - best_step):
        advance()
    return final, nats


@torch.no_grad()
def score_kernels(
    vae: KernelVAE, kernels: Tensor, samples: int = 500, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean log-density of kernels, in nats a kernel in the kernels' raw units.

    Args:
        vae: a fitted density.
        kernels: [n, k₁, …, k_d].
        samples: K of the importance-weighted bound, on each kernel.
        advance: called after each kernel batch; see `score_batches`.

    Returns:
        "prior": the VAE's bound; "standard_normal": N(0, 1) on each weight; "full_gaussian": the
        full-covariance Gaussian of the kernels that the VAE was fitted to.
    """
    total = 0.0
    for chunk in kernels.split(_chunk(samples)):
        total += float(vae.log_prob_estimate(chunk, samples).double().sum())
        advance()
    flat = kernels.flatten(1)
    gaussian = MultivariateNormal(vae.loc, scale_tril=vae.scale_tril)
    return {
        "prior": total / len(kernels),
        "standard_normal": float(Normal(0.0, 1.0).log_prob(flat).double().sum(1).mean()),
        "full_gaussian": float(gaussian.log_prob(flat).double().mean()),
    }


def score_batches(kernels: int, samples: int) -> int:
    """The batches in which `score_kernels` takes so many kernels."""
    return math.ceil(kernels / _chunk(samples))


def _chunk(samples: int) -> int:
    return max(1, _CHUNK // samples)


def _fit(
    kernels: Tensor,
    identities: Tensor,
    latent_size: int,
    hidden: Sequence[int],
    steps: int,
    advance: Callable[[], None],
    held_out: Tensor | None,
    schedule: int | None = None,
) -> tuple[KernelVAE, int]:
    """Fit to `kernels` for `steps` of a cosine schedule; with `held_out`, return its best moment and that step."""
    schedule = schedule or steps
    vae = KernelVAE(kernels.shape[1:], latent_size, hidden)
    gaussian = fit_gaussian(kernels, identities)
    vae.standardise_by(gaussian.loc, gaussian.scale_tril)
    optimizer = torch.optim.Adam(vae.parameters(), lr=_LEARNING_RATE, fused=True)
    best, best_step, best_score = copy.deepcopy(vae.state_dict()), 0, -math.inf
    check_every = max(1, steps // _CHECKS)
    for step in range(steps + 1):
        if held_out is not None and (step % check_every == 0 or step == steps):
            with torch.no_grad():
                score = float(vae.log_prob_estimate(held_out, 4).mean())
            if score > best_score:
                best, best_step, best_score = copy.deepcopy(vae.state_dict()), step, score
        if step == steps:
            break
        if step == 0:
            # Both networks at 0 are a saddle point: no gradient tells either to use z. Step 0, the Gaussian itself,
            # has been scored; from here the encoder says something about w.
            output = vae.encoder[-1]
            assert isinstance(output, nn.Linear)
            output.reset_parameters()
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * _LEARNING_RATE * (1 + math.cos(math.pi * step / schedule))
        batch = kernels[torch.randint(len(kernels), (min(_BATCH, len(kernels)),))]
        log_likelihood, log_ratio = vae.log_weights(batch, torch.randn(1, len(batch), latent_size))
        # The KL of z rises from a tenth of its weight: at full weight from the start, z is never taken up.
        weight = min(1.0, 0.1 + 0.9 * step / (_WARM_UP * schedule))
        optimizer.zero_grad()
        (-(log_likelihood + weight * log_ratio).mean()).backward()
        optimizer.step()
        advance()
    if held_out is not None:
        vae.load_state_dict(best)
    return vae.eval().requires_grad_(False), best_step if held_out is not None else steps
