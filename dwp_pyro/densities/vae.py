"""A variational autoencoder over convolution kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.densities.gradient_fit import GradientFitted

__all__ = ["KernelVAE"]

# Scales of 0.0025 to 403 standard deviations cover real kernels; without limits the density of repeated (dead) kernels
# is unbounded, and the fit diverges.
_MAX_LOG_SCALE = 6.0

_WARM_UP = 0.3  # fraction of the schedule


class KernelVAE(GradientFitted):
    """p(w) = ∫ p(w|z) p(z) dz for one kernel w, with a reverse model r(z|w).

    With the standardized kernel u (D numbers, see `KernelDistribution`) and z of L numbers,

        p(z) = N(0, I),   p(u|z) = N(μ(z), diag σ²(z)),   r(z|u) = N(m(u), diag s²(u)),

    where the decoder (μ, σ) and the encoder (m, s) are perceptrons on flattened kernels. A diagonal p(u|z) is a
    correlated p(w|z): a decoder with independent noise in w (A = cI in Atanov et al. 2018 and Kuzina et al. 2019) has
    to learn the correlation of neighboring weights. A decoder that ignores z is the full-covariance Gaussian.

    Args:
        kernel_shape: Spatial shape of a kernel, [k₁, …, k_d]; D is its product.
        latent_size: Latent size L.
        hidden: Widths of the hidden layers of encoder and decoder; empty for linear ones.

    Examples:
        >>> import torch
        >>> from dwp_pyro import KernelVAE
        >>> vae = KernelVAE((3, 3, 3), latent_size=2)
        >>> kernels = vae.rsample([5])
        >>> tuple(vae.bound(kernels, torch.randn(10, 5, 2)).shape)
        (5,)
    """

    def __init__(self, kernel_shape: Sequence[int], latent_size: int = 8, hidden: Sequence[int] = (32,)) -> None:
        super().__init__(kernel_shape)
        self.latent_size = latent_size
        self.hidden = tuple(hidden)
        size = self.kernel_shape.numel()
        self.encoder = _perceptron(size, hidden, 2 * latent_size)
        self.decoder = _perceptron(latent_size, tuple(reversed(self.hidden)), 2 * size)

    def init_args(self) -> dict[str, Any]:
        return {"latent_size": self.latent_size, "hidden": list(self.hidden)}

    def loss(self, w: Tensor, fraction: float) -> Tensor:
        """Return the mean negative one-sample bound in nats per kernel, []; the weight of the KL of z warms up."""
        log_likelihood, log_ratio = self._log_weights(self.standardize(w), torch.randn(1, len(w), self.latent_size))
        # At full weight from the start the decoder never learns to use z.
        weight = min(1.0, 0.1 + 0.9 * fraction / _WARM_UP)
        return -(log_likelihood - self.log_abs_det() + weight * log_ratio).mean()

    def prepare_first_step(self) -> None:
        """Initialize the encoder's output: with both networks at 0 neither receives a gradient to use z."""
        output = self.encoder[-1]
        assert isinstance(output, nn.Linear)
        output.reset_parameters()

    def encode(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale of r(z|w), each [..., L], of kernels [..., *kernel_shape]."""
        m, log_s = _halves(self.encoder(self.standardize(w)))
        return m, log_s.exp()

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale of p(u|z), each [..., D], of latents [..., L]."""
        loc, log_scale = _halves(self.decoder(z))
        return loc, log_scale.exp()

    def bound(self, w: Tensor, noise: Tensor) -> Tensor:
        """Return the importance-weighted lower bound on log p(w) for given noise, in nats of the raw kernel.

        ℓ = log (1/K) Σ_k p(w|z_k) p(z_k) / r(z_k|w),  z_k = m(w) + s(w) ε_k. For ε ~ N(0, I) the mean of exp(ℓ) is
        p(w) for every K; the mean of ℓ is below log p(w) and rises with K (Burda et al. 2016, eq. 8). K = 1 is the
        bound of Atanov et al. 2018, eq. 7. Differentiable in w and in all parameters.

        Args:
            w: Kernels, [..., *kernel_shape].
            noise: Noise ε, [K, ..., L]; its middle axes are the batch axes of w.

        Returns:
            One ℓ per kernel, [...].
        """
        return self._bound(self.standardize(w), noise) - self.log_abs_det()

    @torch.no_grad()
    def latent_divergence(self, w: Tensor) -> Tensor:
        """Return KL(r(z_j|w) ‖ p(z_j)) of each latent dimension j, [L] in nats, the mean over n kernels.

        0 for a dimension that carries no information about a kernel.

        Args:
            w: Kernels, [n, *kernel_shape].
        """
        m, s = self.encode(w)
        return (0.5 * (m.square() + s.square() - 1) - s.log()).mean(0)

    def log_prob_standardized(self, u: Tensor, samples: int = 1) -> Tensor:
        """Return one draw of the K-sample bound, K = `samples`: [..., D] → [...]."""
        return self._bound(u, torch.randn(samples, *u.shape[:-1], self.latent_size, dtype=u.dtype, device=u.device))

    def _bound(self, u: Tensor, noise: Tensor) -> Tensor:
        log_likelihood, log_ratio = self._log_weights(u, noise)
        log_weights = log_likelihood + log_ratio
        return log_weights[0] if len(noise) == 1 else log_weights.logsumexp(0) - math.log(len(noise))

    def _log_weights(self, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(u|z_k) and log p(z_k)/r(z_k|w), each [K, ...]; noise as for `bound`."""
        m, log_s = _halves(self.encoder(u))
        z = torch.addcmul(m, log_s.exp(), noise)
        loc, log_scale = _halves(self.decoder(z))
        log_likelihood = (
            -0.5 * ((u - loc) * log_scale.neg().exp()).square().sum(-1)
            - log_scale.sum(-1)
            - 0.5 * u.shape[-1] * math.log(2 * math.pi)
        )
        # The normalizing constants of p(z) and r(z|w) cancel.
        log_ratio = 0.5 * (noise.square() - z.square()).sum(-1) + log_s.sum(-1)
        return log_likelihood, log_ratio

    def rsample_standardized(self, shape: Sequence[int]) -> Tensor:
        z = torch.randn(*shape, self.latent_size, dtype=self.loc.dtype, device=self.loc.device)
        loc, scale = self.decode(z)
        return loc + scale * torch.randn_like(loc)


def _halves(output: Tensor) -> tuple[Tensor, Tensor]:
    """Split a perceptron's output into mean and log-scale."""
    loc, log_scale = output.chunk(2, dim=-1)
    return loc, F.hardtanh(log_scale, -_MAX_LOG_SCALE, _MAX_LOG_SCALE)


def _perceptron(in_size: int, hidden: Sequence[int], out_size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(in_size, width), nn.SiLU()]
        in_size = width
    last = nn.Linear(in_size, out_size)
    # With zeros both networks return N(0, I): the fit starts at the full-covariance Gaussian.
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
