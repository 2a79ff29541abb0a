"""Bound of the deep weight prior against a convolutional encoder and decoder, as in the public code of the papers.

$ python -m benchmarks.bound [--device cuda]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.comparison import Row, chosen, ratio, report, time_in_turns
from benchmarks.steps import untrained_prior
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior

#: Device type → number of kernels, to which the time of both sides is proportional; batch of the reference.
_KERNELS = {"cpu": (8192, 1024), "cuda": (131072, 8192)}
_LATENT = 8


class ConvolutionalVAE(nn.Module):
    """Encoder and decoder with 32, 64 and 128 channels; a kernel is a volume of one channel."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, filters: int) -> list[nn.Module]:
            return [nn.Conv3d(channels, filters, 3, padding=1), nn.ReLU()]

        self.encoder = nn.Sequential(
            *block(1, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(128 * 27, 2 * _LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(_LATENT, 128 * 27),
            nn.Unflatten(1, (128, 3, 3, 3)),
            *block(128, 64),
            *block(64, 32),
            nn.Conv3d(32, 2, 3, padding=1),
        )

    def forward(self, kernels: Tensor) -> Tensor:
        """Return the bound with one z, up to constants, of kernels [n, 3, 3, 3]: [n]."""
        mean, log_scale = self.encoder(kernels[:, None]).chunk(2, 1)
        noise = torch.randn_like(mean)
        z = mean + log_scale.exp() * noise
        loc, log_spread = self.decoder(z).unbind(1)
        fit = -0.5 * ((kernels - loc) * (-log_spread).exp()).square() - log_spread
        return fit.flatten(1).sum(1) + (0.5 * (noise.square() - z.square()) + log_scale).sum(1)


def rows(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    ours = DeepWeightPrior(untrained_prior().to(device).block("bottom"))
    theirs = ConvolutionalVAE().to(device).requires_grad_(False)
    count, at_once = _KERNELS[device.type]
    kernels = 0.01 * torch.randn(count, 3, 3, 3, device=device)

    def ours_step() -> None:
        ours.log_prob(kernels.detach().requires_grad_()).sum().backward()

    def their_step() -> None:
        for chunk in kernels.split(at_once):
            theirs(chunk.detach().requires_grad_()).sum().backward()

    seconds = time_in_turns({"ours": ours_step, "theirs": their_step}, 7, device)
    metrics = ratio(seconds["theirs"], seconds["ours"])
    each = (f"{statistics.median(seconds[side]) * 1e3:.0f} ms" for side in ("ours", "theirs"))
    note = f"{count} kernels: {' and '.join(each)}"
    yield Row(
        "times faster: DWP bound and gradient, K = 1",
        "Conv3d encoder/decoder of 32-64-128, one z",
        30,
        *metrics,
        note,
        True,
    )


if __name__ == "__main__":
    report(rows(chosen().device))
