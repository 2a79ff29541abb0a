"""Divergences summed over the weights of sites, and bounds summed over kernels: value and gradient in one go."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, Independent, kl_divergence
from torch.nn import functional as F

from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.distributions.kernel_density import KernelGaussian
from dwp_pyro.distributions.log_scale_normal import LogScaleNormal
from dwp_pyro.distributions.log_uniform import APPROXIMATION, LogUniform

__all__ = ["chunked_sum", "kernel_changes", "summed_divergence", "summed_entropy"]

#: Kernels at once: what a processor's cache holds, or what keeps a GPU busy.
_CHUNK, _CHUNK_OF_A_GPU = 16384, 131072


def summed_divergence(pairs: Iterable[tuple[Distribution, Distribution]]) -> Tensor:
    """Σ KL(q‖p) over all weights of some sites, []; the sum of `kl_divergence` in a fraction of the passes over memory.

    In closed form and with its gradient for a `LogScaleNormal` q and a prior that is Normal, log-uniform, or a
    `DeepWeightPrior` whose density is a full-covariance Gaussian; the sites of a kind are one node of the graph. Any
    other pair takes its registered divergence, and so does a prior that is itself trained: the gradients here are those
    of q alone.

    Args:
        pairs: q and p of each site, at least one.
    """
    totals: list[Tensor] = []
    kinds: dict[Any, list[tuple[LogScaleNormal, Any]]] = defaultdict(list)
    for q, p in pairs:
        base_q, base_p = (fn.base_dist if isinstance(fn, Independent) else fn for fn in (q, p))
        if isinstance(base_q, LogScaleNormal) and (divergence := _in_closed_form(base_p)) is not None:
            kinds[divergence].append((base_q, base_p))
        else:
            totals.append(kl_divergence(q, p).sum())
    for divergence, members in kinds.items():
        sites, priors = zip(*members, strict=True)
        scales = [q.scale.detach() for q in sites]
        totals.append(divergence.apply(priors, scales, *(q.loc for q in sites), *(q.log_scale for q in sites)))
    return torch.stack(totals).sum()


def _in_closed_form(prior: Distribution) -> type[torch.autograd.Function] | None:
    """What sums the divergences from such a prior, with their gradients."""
    if _is_trained(prior):
        return None
    if type(prior) is Normal or (isinstance(prior, DeepWeightPrior) and isinstance(prior.density, KernelGaussian)):
        return _NormalDivergence
    return _LogUniformDivergence if isinstance(prior, LogUniform) else None


def _is_trained(prior: Distribution) -> bool:
    tensors = [tensor for tensor in vars(prior).values() if isinstance(tensor, Tensor)]
    if isinstance(prior, DeepWeightPrior):
        tensors += [*prior.density.parameters(), *prior.density.buffers()]
    return any(tensor.requires_grad for tensor in tensors)


def summed_entropy(q: Distribution) -> Tensor:
    """H[q] of all weights of a site together, []."""
    base = q.base_dist if isinstance(q, Independent) else q
    if isinstance(base, LogScaleNormal):
        return base.log_scale.sum() + 0.5 * (1 + math.log(2 * math.pi)) * base.loc.numel()
    return q.entropy().sum()


_Numbers = tuple[bool, float | None]
_read: WeakKeyDictionary[Normal, tuple[Tensor, Tensor, tuple[int, int], _Numbers]] = WeakKeyDictionary()


def _numbers(prior: Normal) -> _Numbers:
    """Whether a prior's means are all one number, 0; and its scale, None if that is not one number.

    Read anew only if the prior has other tensors, or they were written to (`tensor.data` apart): a step that reads
    has to wait for a GPU.
    """
    if prior.loc.is_inference() or prior.scale.is_inference():  # these do not count what is written to them
        return _read_numbers(prior)
    versions = (prior.loc._version, prior.scale._version)
    known = _read.get(prior)
    if known is None or known[0] is not prior.loc or known[1] is not prior.scale or known[2] != versions:
        known = _read[prior] = (prior.loc, prior.scale, versions, _read_numbers(prior))
    return known[3]


def _read_numbers(prior: Normal) -> _Numbers:
    loc, scale = (_unexpanded(part.detach()) for part in (prior.loc, prior.scale))
    return loc.numel() == 1 and loc.item() == 0, scale.item() if scale.numel() == 1 else None


def _unexpanded(tensor: Tensor) -> Tensor:
    """Without the repetitions of `expand`: their axes have the length 1 again."""
    return tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]


def _quadratic(loc: Tensor, prior: Normal | DeepWeightPrior) -> tuple[Tensor, Tensor, Tensor | None, float, Any]:
    """m − a, Λ (m − a), the diagonal of Λ (None for 1), f and −½ log |f Λ|, where the prior is N(a, (f Λ)⁻¹)."""
    if isinstance(prior, DeepWeightPrior):
        density: Any = prior.density
        precision = density.precision() / prior.scale**2
        deviation = loc - prior.mean
        weighted = F.linear(deviation.flatten(-len(prior.event_shape)), precision).view_as(deviation)
        diagonal = precision.diagonal().reshape(prior.event_shape)
        volume = prior.batch_shape.numel() * (density.log_volume() + prior.log_scale())
        return deviation, weighted, diagonal, 1.0, volume
    around_0, scale = _numbers(prior)
    deviation = loc if around_0 else loc - _unexpanded(prior.loc)
    if scale is not None:
        return deviation, deviation, None, scale**-2, loc.numel() * math.log(scale)
    scales = _unexpanded(prior.scale)
    precision = scales.square().reciprocal()
    return deviation, precision * deviation, precision, 1.0, scales.log().sum() * (loc.numel() / scales.numel())


class _NormalDivergence(torch.autograd.Function):
    """Σ over sites of KL(N(m, s²) ‖ N(a, (f Λ)⁻¹)) = ½ f [(m − a)ᵀ Λ (m − a) + Σ Λᵢᵢ s²] − Σ log s − N/2 − ½ log |f Λ|.

    By the means m of all sites, then their log s.
    """

    @staticmethod
    def forward(ctx: Any, priors: Sequence[Any], scales: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.factors = []
        means, log_scales = _halves(parameters)
        by_mean, by_log_scale = [], []
        total = means[0].new_zeros(())
        rest: Any = 0.0
        minus_one = means[0].new_full((), -1)
        for prior, scale, loc, log_scale in zip(priors, scales, means, log_scales, strict=True):
            deviation, weighted, precision, factor, constant = _quadratic(loc, prior)
            weighted_scale = scale if precision is None else scale * precision
            rest = rest + constant - 0.5 * loc.numel()
            total -= log_scale.sum()
            total.add_(scale.flatten().dot(weighted_scale.flatten()), alpha=0.5 * factor)
            total.add_(deviation.flatten().dot(weighted.flatten()), alpha=0.5 * factor)
            ctx.factors.append(factor)
            by_mean.append(weighted)
            by_log_scale.append(torch.addcmul(minus_one, scale, weighted_scale, value=factor))
        ctx.save_for_backward(*by_mean, *by_log_scale)
        return total + rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_mean, by_log_scale = _halves(ctx.saved_tensors)
        # Not written over: where the prior is around 0, these are the means themselves.
        by_mean = [weighted * (factor * grad) for weighted, factor in zip(by_mean, ctx.factors, strict=True)]
        return None, None, *by_mean, *(_times(each, grad) for each in by_log_scale)


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    half = len(tensors) // 2
    return tensors[:half], tensors[half:]


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Written over the tensor, for new memory is slow; autograd then refuses a second way back.

    Left alone by a factor of 1, which on a CPU costs nothing to ask for.
    """
    return tensor if factor.device.type == "cpu" and factor.item() == 1 else tensor.mul_(factor)


class _LogUniformDivergence(torch.autograd.Function):
    """Σ of Molchanov et al. 2017, eq. 14, but for its constant, over sites; α = (s/m)².

    By the means m of all sites, then their log s. softplus(−log α) is log (1 + α) − log α, and σ(x) is
    (1 + tanh x/2) / 2: fewer and cheaper passes. In float32 to 10⁻⁶ nats a weight, and the gradient to 10⁻⁵ of itself,
    where |m| is less than a tenth of s to 2·10⁻³. An α beyond the largest number of its type counts as that, one below
    the inverse as the inverse.
    """

    @staticmethod
    def forward(ctx: Any, priors: Sequence[Any], scales: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        means, _ = _halves(parameters)
        k1, k2, k3 = APPROXIMATION
        steepest = k1 * k3 / 2
        # Numbers as tensors: an operation would convert them each time.
        numbers = (0, 1, k2 / 2, -steepest)
        zero, one, shift, minus_steepest = (means[0].new_full((), number) for number in numbers)
        by_mean, by_log_scale = [], []
        log_alphas, curves, log_wholes = [], [], []  # summed
        for loc, scale in zip(means, scales, strict=True):
            alpha = scale / loc
            alpha.mul_(alpha)
            curve = alpha.log()
            most = math.log(torch.finfo(loc.dtype).max)
            limited = loc.device.type != "cpu"  # where to ask would be to wait
            if not limited:
                log_alpha = curve.sum()
                limited = not math.isfinite(log_alpha.item())  # some m is 0, say
            if limited:
                # The logarithms, not α itself: where it is infinite, no slope is left.
                log_alpha = curve.clamp_(-most, most).sum()
            log_alphas.append(log_alpha)
            torch.add(shift, curve, alpha=k3 / 2, out=curve).tanh_()
            curves.append(curve.sum())
            whole = torch.add(one, alpha, out=alpha)  # 1 + α
            # dKL/dlog s = 2 dKL/dlog α = −2 k₁ k₃ σ(x) (1 − σ(x)) − 1 / (1 + α), and by m it is −1/m times that
            torch.addcmul(minus_steepest, curve, curve, value=steepest, out=curve)
            by_log_scale.append(curve.addcdiv_(one, whole, value=-1))
            whole.log_()
            log_wholes.append((whole.clamp_(max=most) if limited else whole).sum())
            slope = torch.addcdiv(zero, curve, loc, value=-1, out=whole)
            by_mean.append(slope.nan_to_num_(0, 0, 0) if limited else slope)
        ctx.save_for_backward(*by_mean, *by_log_scale)
        softplus = torch.stack(log_wholes) - torch.stack(log_alphas)  # first, for they may be large
        weights = sum(loc.numel() for loc in means)
        total: Tensor = 0.5 * (softplus.sum() + k1 * (weights - torch.stack(curves).sum()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_times(each, grad) for each in ctx.saved_tensors)


def chunked_sum(
    value_and_gradients: Callable[[Tensor], tuple[Tensor, ...]],
    kernels: Tensor,
    parameters: Iterable[nn.Parameter] = (),
) -> Tensor:
    """Σ of a function over kernels, [], a chunk of them at a time: memory does not grow with their number.

    The gradient is taken with the value, so that no chunk's graph outlives it.

    Args:
        value_and_gradients: kernels [n, ...] → the sum over these, [], and its gradients by them and by each parameter.
        kernels: [N, ...].
        parameters: what else to differentiate by.
    """
    total: Tensor = _ChunkedSum.apply(value_and_gradients, kernels, *parameters)
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_and_gradients: Callable[[Tensor], tuple[Tensor, ...]], kernels: Tensor, *parameters: Tensor
    ) -> Tensor:
        total = kernels.new_zeros(())
        by_kernels = torch.empty_like(kernels)
        by_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        size = _CHUNK if kernels.device.type == "cpu" else _CHUNK_OF_A_GPU
        for chunk, place in zip(kernels.split(size), by_kernels.split(size), strict=True):
            value, by_chunk, *rest = value_and_gradients(chunk)
            total += value
            place.copy_(by_chunk)
            for derivative, part_of_it in zip(by_parameters, rest, strict=True):
                derivative += part_of_it
        ctx.save_for_backward(by_kernels, *by_parameters)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_times(derivative, grad) for derivative in ctx.saved_tensors)


def kernel_changes(kernels: Sequence[Tensor], means: Sequence[Tensor], count: int) -> Tensor:
    """Some kernels of several sites, less their means, [count, *kernel_shape]: those that follow a random one.

    The sites are a circle of kernels, each of which is as likely as any other, and neighbours lie together in memory.

    Args:
        kernels: of each site, [n, *kernel_shape].
        means: of the same shapes; no gradient is taken by them.
        count: at most as many as there are.
    """
    total = sum(map(len, kernels))
    if kernels[0].device.type != "cpu":
        # The start stays on the device: a graph draws it anew, and nobody waits for it.
        changes = torch.cat(list(kernels)) - torch.cat(list(means)).detach()
        if count == total:
            return changes
        places = torch.arange(count, device=changes.device) + torch.randint(total, (), device=changes.device)
        return changes.index_select(0, places % total)
    start = int(torch.randint(total, ())) if count < total else 0
    window: Tensor = _KernelChanges.apply(means, _window([len(site) for site in kernels], count, start), *kernels)
    return window


def _window(sizes: Sequence[int], count: int, start: int) -> list[list[slice]]:
    """Of several sites the slices that a window of the circle covers, none of which meet."""
    total = sum(sizes)
    chosen = []
    offset = 0
    for size in sizes:
        bounds = [(max(0, low - offset), min(size, low + count - offset)) for low in (start, start - total)]
        chosen.append([slice(low, high) for low, high in bounds if low < high])
        offset += size
    return chosen


class _KernelChanges(torch.autograd.Function):
    """Each kernel passes through memory once."""

    @staticmethod
    def forward(ctx: Any, means: Sequence[Tensor], chosen: Sequence[Sequence[slice]], *kernels: Tensor) -> Tensor:
        ctx.chosen, ctx.sizes = chosen, [len(site) for site in kernels]
        lengths = [each.stop - each.start for slices in chosen for each in slices]
        changes = kernels[0].new_empty(sum(lengths), *kernels[0].shape[1:])
        pairs = zip(kernels, means, chosen, strict=True)
        parts = [(site[each], mean[each]) for site, mean, slices in pairs for each in slices]
        for (part, mean), place in zip(parts, changes.split(lengths), strict=True):
            torch.sub(part, mean, out=place)
        return changes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = []
        start = 0
        for slices, size in zip(ctx.chosen, ctx.sizes, strict=True):
            count = sum(each.stop - each.start for each in slices)
            ours = grad[start : start + count]
            start += count
            if 0 < count < size:
                whole = grad.new_zeros(size, *grad.shape[1:])
                for each, part in zip(slices, ours.split([s.stop - s.start for s in slices]), strict=True):
                    whole[each] = part
                ours = whole
            gradients.append(ours if count else None)
        return None, None, *gradients
