"""A variational autoencoder over single convolution kernels, of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KernelVAE"]

# exp(±6) spans 0.0025 to 403 standard deviations of the kernels: no real kernel needs more, and a
# density that is unbounded on repeated kernels (dead ones, say) must not run away with the fit.
_MAX_LOG_SCALE = 6.0


class KernelVAE(nn.Module):
    """p(w) = ∫ p(w|z) p(z) dz for one kernel w, with a reverse model r(z|w).

    With u = A⁻¹(w − b) the standardised kernel (D numbers) and z of L numbers,

        p(z) = N(0, I),   p(u|z) = N(μ(z), diag σ²(z)),   r(z|u) = N(m(u), diag s²(u)),

    where the decoder (μ, σ) and the encoder (m, s) are perceptrons on flattened kernels. (b, A) are
    fixed before the fit: the mean and a lower-triangular root of the kernels' covariance. A diagonal
    p(u|z) is then a correlated p(w|z), and a decoder that ignores z *is* the full-covariance
    Gaussian, from which the fit starts: neighbouring weights are strongly correlated, and a decoder
    with independent noise in w has first to learn that (Atanov et al. 2018 and Kuzina et al. 2019
    use such a one, A = cI).

    Args:
        kernel_shape: spatial shape of a kernel, [k₁, …, k_d]; D is its product.
        latent_size: L.
        hidden: widths of the hidden layers of encoder and decoder; empty for linear ones.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, kernel_shape: Sequence[int], latent_size: int = 8, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.kernel_shape = torch.Size(kernel_shape)
        self.latent_size = latent_size
        self.hidden = tuple(hidden)
        size = self.kernel_shape.numel()
        self.encoder = _perceptron(size, hidden, 2 * latent_size)
        self.decoder = _perceptron(latent_size, tuple(reversed(self.hidden)), 2 * size)
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale_tril", torch.eye(size))

    def standardise_by(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set b, of shape [D], and the lower-triangular A, of shape [D, D]."""
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)

    def encode(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels [..., *kernel_shape] → mean and scale of r(z|w), each [..., L]."""
        return self._encode(self._standardise(w))

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [..., L] → mean and scale of the standardised kernel u, each [..., D]."""
        loc, log_scale = self.decoder(z).chunk(2, dim=-1)
        return loc, log_scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp()

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
        log_likelihood, log_ratio = self.log_weights(w, noise)
        return (log_likelihood + log_ratio).logsumexp(0) - math.log(len(noise))

    def log_weights(self, w: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """log p(w|z_k) and log p(z_k)/r(z_k|w), [K, ...] each; arguments as for `bound`."""
        u = self._standardise(w)
        m, s = self._encode(u)
        z = m + s * noise
        loc, scale = self.decode(z)
        log_likelihood = (
            -0.5 * ((u - loc) / scale).square().sum(-1)
            - scale.log().sum(-1)
            - 0.5 * u.shape[-1] * math.log(2 * math.pi)
            - self.scale_tril.diagonal().log().sum()
        )
        # The normalising constants of p(z) and r(z|w) cancel.
        log_ratio = 0.5 * (noise.square() - z.square()).sum(-1) + s.log().sum(-1)
        return log_likelihood, log_ratio

    def log_prob_estimate(self, w: Tensor, samples: int = 1) -> Tensor:
        """One draw of the K-sample bound, K = `samples`; kernels [..., *kernel_shape] → [...]."""
        batch = w.shape[: w.dim() - len(self.kernel_shape)]
        return self.bound(w, torch.randn(samples, *batch, self.latent_size, dtype=w.dtype, device=w.device))

    def rsample(self, shape: Sequence[int] = ()) -> Tensor:
        """Kernels drawn from p(w): z, then w; of shape [*shape, *kernel_shape]."""
        z = torch.randn(*shape, self.latent_size, dtype=self.loc.dtype, device=self.loc.device)
        loc, scale = self.decode(z)
        u = loc + scale * torch.randn_like(loc)
        w = self.loc + F.linear(u, self.scale_tril)
        return w.reshape(*shape, *self.kernel_shape)

    def _standardise(self, w: Tensor) -> Tensor:
        flat = w.flatten(-len(self.kernel_shape))
        inverse = torch.linalg.solve_triangular(
            self.scale_tril,
            torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device),
            upper=False,
        )
        return F.linear(flat - self.loc, inverse)

    def _encode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.encoder(u).chunk(2, dim=-1)
        return loc, log_scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp()


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
