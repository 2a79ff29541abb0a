"""Divergences summed over the weights of a site, and bounds summed over kernels: value and gradient in one go."""

from __future__ import annotations

import math
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


def summed_divergence(q: Distribution, p: Distribution) -> Tensor:
    """Σ KL(q‖p) over all weights of a site, []; the sum of `kl_divergence`, at a fraction of the passes over memory.

    In closed form and with its gradient for a `LogScaleNormal` q and a prior that is Normal, log-uniform, or a
    `DeepWeightPrior` whose density is a full-covariance Gaussian. Any other pair takes its registered divergence,
    and so does a prior that is itself trained: the gradients here are those of q alone.
    """
    base_q, base_p = (fn.base_dist if isinstance(fn, Independent) else fn for fn in (q, p))
    if isinstance(base_q, LogScaleNormal) and not _is_trained(base_p):
        if type(base_p) is Normal:
            around_0, scale = _numbers(base_p)
            loc = base_q.loc.detach()
            deviation = loc if around_0 else loc - _unexpanded(base_p.loc.detach())
            if scale is not None:
                volume = base_q.loc.numel() * math.log(scale)
                return _normal_divergence(base_q, deviation, deviation, None, volume, scale**-2)
            scales = _unexpanded(base_p.scale.detach())
            constant = scales.log().sum() * (base_q.loc.numel() / scales.numel())
            precision = scales.square().reciprocal()
            return constant + _normal_divergence(base_q, deviation, precision * deviation, precision)
        if isinstance(base_p, DeepWeightPrior) and isinstance(base_p.density, KernelGaussian):
            density = base_p.density
            precision = density.precision() / base_p.scale**2
            deviation = base_q.loc.detach() - base_p.mean
            weighted = F.linear(deviation.flatten(-len(base_p.event_shape)), precision).view_as(deviation)
            diagonal = precision.diagonal().reshape(base_p.event_shape)
            constant = base_p.batch_shape.numel() * (density.log_volume() + base_p.log_scale())
            return constant + _normal_divergence(base_q, deviation, weighted, diagonal)
        if isinstance(base_p, LogUniform):
            total: Tensor = _LogUniformDivergence.apply(base_q.loc, base_q.scale.detach(), base_q.log_scale)
            return total
    return kl_divergence(q, p).sum()


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


def _normal_divergence(
    q: LogScaleNormal,
    deviation: Tensor,
    weighted: Tensor,
    precision: Tensor | None,
    constant: float = 0.0,
    factor: float = 1.0,
) -> Tensor:
    tensors = (q.loc, q.log_scale, q.scale.detach(), deviation, weighted, precision)
    total: Tensor = _NormalDivergence.apply(*tensors, constant, factor)
    return total


class _NormalDivergence(torch.autograd.Function):
    """½ f [(m − a)ᵀ Λ (m − a) + Σ Λᵢᵢ s²] − Σ log s − N/2 + c: KL(N(m, s²) ‖ N(a, (f Λ)⁻¹)) where c is −½ log |f Λ|.

    `deviation` is m − a, `weighted` Λ (m − a), `precision` the diagonal of Λ, None for 1; `factor` is f, `constant` c.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loc: Tensor,
        log_scale: Tensor,
        scale: Tensor,
        deviation: Tensor,
        weighted: Tensor,
        precision: Tensor | None,
        constant: float,
        factor: float,
    ) -> Tensor:
        weighted_scale = scale if precision is None else scale * precision
        spread = scale.flatten().dot(weighted_scale.flatten())
        distance = deviation.flatten().dot(weighted.flatten())
        by_log_scale = torch.addcmul(scale.new_full((), -1), scale, weighted_scale, value=factor)
        ctx.save_for_backward(weighted, by_log_scale)
        ctx.factor = factor
        return torch.add(constant - 0.5 * loc.numel() - log_scale.sum(), distance + spread, alpha=0.5 * factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weighted, by_log_scale = ctx.saved_tensors
        return weighted * (ctx.factor * grad), _times(by_log_scale, grad), None, None, None, None, None, None


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Written over the tensor, for new memory is slow; autograd then refuses a second way back.

    Left alone by a factor of 1, which on a CPU costs nothing to ask for.
    """
    return tensor if factor.device.type == "cpu" and factor.item() == 1 else tensor.mul_(factor)


#: Of |m|/s, which counts as no more: its square is a number in float32.
_MOST_SIGNAL = 1e18


class _LogUniformDivergence(torch.autograd.Function):
    """Σ of Molchanov et al. 2017, eq. 14, but for its constant, with t = log α = −log r, r = (m/s)².

    softplus(−t) is log (1 + r), and σ(x) is (1 + tanh x/2) / 2: fewer and cheaper passes. In float32 to 10⁻⁶ nats a
    weight, and the gradient to 10⁻⁵ of itself, where |m| is less than a tenth of s to 2·10⁻³.
    """

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, log_scale: Tensor) -> Tensor:
        k1, k2, k3 = APPROXIMATION
        ratio = (loc / scale).clamp_(-_MOST_SIGNAL, _MOST_SIGNAL)
        ratio.mul_(ratio)
        curve = ratio.log()
        torch.add(loc.new_full((), -k2 / 2), curve, alpha=k3 / 2, out=curve).tanh_()  # numbers first: one pass
        whole = 1 + ratio
        total = k1 / 2 * (curve.sum() + loc.numel())
        # dKL/dlog s = 2 dKL/dt = −2 k₁ k₃ σ(x) (1 − σ(x)) − r / (1 + r)
        factor = k1 * k3 / 2
        torch.addcmul(loc.new_full((), -factor), curve, curve, value=factor, out=curve)
        by_log_scale = curve.addcdiv_(ratio, whole, value=-1)
        total += 0.5 * whole.log_().sum()
        by_loc = torch.addcdiv(loc.new_zeros(()), by_log_scale, loc, value=-1, out=ratio)
        ctx.save_for_backward(by_log_scale, by_loc.nan_to_num_(0, 0, 0))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        by_log_scale, by_loc = ctx.saved_tensors
        return _times(by_loc, grad), None, _times(by_log_scale, grad)


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
