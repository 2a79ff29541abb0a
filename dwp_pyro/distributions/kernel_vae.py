"""A variational autoencoder over single convolution kernels, of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.distributions.kernel_density import KernelDensity

__all__ = ["KernelVAE"]

# exp(±6) spans 0.0025 to 403 standard deviations of the kernels: no real kernel needs more, and a
# density that is unbounded on repeated kernels (dead ones, say) must not run away with the fit.
_MAX_LOG_SCALE = 6.0


class KernelVAE(KernelDensity):
    """p(w) = ∫ p(w|z) p(z) dz for one kernel w, with a reverse model r(z|w).

    With u the standardised kernel (D numbers, see `KernelDensity`) and z of L numbers,

        p(z) = N(0, I),   p(u|z) = N(μ(z), diag σ²(z)),   r(z|u) = N(m(u), diag s²(u)),

    where the decoder (μ, σ) and the encoder (m, s) are perceptrons on flattened kernels. A diagonal
    p(u|z) is a correlated p(w|z): neighbouring weights are strongly correlated, and a decoder with
    independent noise in w has first to learn that (Atanov et al. 2018 and Kuzina et al. 2019 use such a
    one, A = cI). A decoder that ignores z is the full-covariance Gaussian.

    Args:
        kernel_shape: spatial shape of a kernel, [k₁, …, k_d]; D is its product.
        latent_size: L.
        hidden: widths of the hidden layers of encoder and decoder; empty for linear ones.
    """

    def __init__(self, kernel_shape: Sequence[int], latent_size: int = 8, hidden: Sequence[int] = (32,)) -> None:
        super().__init__(kernel_shape)
        self.latent_size = latent_size
        self.hidden = tuple(hidden)
        size = self.kernel_shape.numel()
        self.encoder = _perceptron(size, hidden, 2 * latent_size)
        self.decoder = _perceptron(latent_size, tuple(reversed(self.hidden)), 2 * size)

    def form(self) -> dict[str, Any]:
        return {"latent_size": self.latent_size, "hidden": list(self.hidden)}

    def encode(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels [..., *kernel_shape] → mean and scale of r(z|w), each [..., L]."""
        m, log_s = _halves(self.encoder(self.standardise(w)))
        return m, log_s.exp()

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [..., L] → mean and scale of the standardised kernel u, each [..., D]."""
        loc, log_scale = _halves(self.decoder(z))
        return loc, log_scale.exp()

    def bound(self, w: Tensor, noise: Tensor) -> Tensor:
        """The importance-weighted lower bound on log p(w) for given noise, in nats of the raw kernel.

        ℓ = log (1/K) Σ_k p(w|z_k) p(z_k) / r(z_k|w),  z_k = m(w) + s(w) ε_k. With ε ~ N(0, I), exp(ℓ) has
        the mean p(w) for every K, so ℓ has a mean below log p(w), which rises with K (Burda et al.
        2016, eq. 8); K = 1 is the bound of Atanov et al. 2018, eq. 7. Differentiable in w and in all
        parameters.

        Args:
            w: kernels [..., *kernel_shape].
            noise: ε [K, ..., L], its middle axes those of w.

        Returns:
            One ℓ a kernel, [...].
        """
        return self._bound(self.standardise(w), noise) - self.log_volume()

    def log_weights(self, w: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """log p(w|z_k) and log p(z_k)/r(z_k|w), [K, ...] each; arguments as for `bound`."""
        log_likelihood, log_ratio = self._log_weights(self.standardise(w), noise)
        return log_likelihood - self.log_volume(), log_ratio

    @torch.no_grad()
    def latent_divergence(self, w: Tensor) -> Tensor:
        """KL(r(z_j|w) ‖ p(z_j)) of each latent dimension j, in nats, its mean over kernels [n, *kernel_shape]; [L].

        0 of a dimension that says nothing about a kernel.
        """
        m, s = self.encode(w)
        return (0.5 * (m.square() + s.square() - 1) - s.log()).mean(0)

    def latent_information(self, samples: int = 256) -> Tensor:
        """Fisher information of each z_j in the mean of p(u|z), Σ_i (∂μ_i/∂z_j / σ_i)², its mean over p(z); [L].

        What the decoder makes of a dimension, where there are no kernels to encode: 0 of one that it ignores.
        """
        z = torch.randn(samples, self.latent_size, dtype=self.loc.dtype, device=self.loc.device, requires_grad=True)
        with torch.enable_grad():
            loc, scale = self.decode(z)
            slopes = [torch.autograd.grad(each.sum(), z, retain_graph=True)[0] for each in loc.unbind(-1)]
        return (torch.stack(slopes, 1) / scale.detach().unsqueeze(-1)).square().sum(1).mean(0)

    def log_prob_standard(self, u: Tensor, samples: int = 1) -> Tensor:
        """One draw of the K-sample bound, K = `samples`; [..., D] → [...]."""
        return self._bound(u, torch.randn(samples, *u.shape[:-1], self.latent_size, dtype=u.dtype, device=u.device))

    def _bound(self, u: Tensor, noise: Tensor) -> Tensor:
        log_likelihood, log_ratio = self._log_weights(u, noise)
        log_weights = log_likelihood + log_ratio
        return log_weights[0] if len(noise) == 1 else log_weights.logsumexp(0) - math.log(len(noise))

    def _log_weights(self, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        m, log_s = _halves(self.encoder(u))
        z = torch.addcmul(m, log_s.exp(), noise)
        loc, log_scale = _halves(self.decoder(z))
        log_likelihood = (
            -0.5 * ((u - loc) * log_scale.neg().exp()).square().sum(-1)
            - log_scale.sum(-1)
            - 0.5 * u.shape[-1] * math.log(2 * math.pi)
        )
        # The normalising constants of p(z) and r(z|w) cancel.
        log_ratio = 0.5 * (noise.square() - z.square()).sum(-1) + log_s.sum(-1)
        return log_likelihood, log_ratio

    def rsample_standard(self, shape: Sequence[int]) -> Tensor:
        z = torch.randn(*shape, self.latent_size, dtype=self.loc.dtype, device=self.loc.device)
        loc, scale = self.decode(z)
        return loc + scale * torch.randn_like(loc)


def _halves(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the scale, from a perceptron's output."""
    loc, log_scale = output.chunk(2, dim=-1)
    return loc, F.hardtanh(log_scale, -_MAX_LOG_SCALE, _MAX_LOG_SCALE)


def _perceptron(in_size: int, hidden: Sequence[int], out_size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(in_size, width), nn.SiLU()]
        in_size = width
    last = nn.Linear(in_size, out_size)
    # Zero: both networks start at N(0, I), the decoder thus at the Gaussian of (b, A).
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
