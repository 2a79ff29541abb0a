"""Fitting the seven VAE priors to 200,000 kernels.

The kernels are drawn from the mixtures of the example study, so that the density that made them is known.

$ python -m benchmarks.priors
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.comparison import Row, report
from dwp_pyro.config import FitPriorConfig
from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.inference.fit_density import BlockKernels, FitSettings, fit_density

_PRIOR = Path(__file__).parents[1] / "studies/archive/whole-tumour/priors/mixture"
_KERNELS, _BOOTSTRAPS = 200_000, 5
_LONGER = 4  # times the steps: what is called convergence


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    mixture = KernelPrior.load(_PRIOR)
    total = sum(card.kernels for card in mixture.cards.values())
    blocks = {}
    for name, card in mixture.cards.items():
        # In proportion, but enough of the smallest: about 200,000 in all.
        count = max(2000, round(_KERNELS * card.kernels / total)) // _BOOTSTRAPS * _BOOTSTRAPS
        kernels = mixture.block(name).rsample([count])
        blocks[name] = BlockKernels(kernels, torch.arange(count) % _BOOTSTRAPS, torch.arange(count))
    config = FitPriorConfig()

    def fit(name: str, steps: int) -> float:
        settings = FitSettings(config.latent_size, config.hidden, steps, 0)
        return fit_density("dwp", blocks[name], settings)[1]["prior"]

    start = time.perf_counter()
    nats = {name: fit(name, config.vae_steps) for name in blocks}
    minutes = (time.perf_counter() - start) / 60
    made = sum(map(len, blocks.values()))
    yield Row(f"minutes to fit the seven VAE priors to {made:,} kernels", "3 minutes", 3, *[minutes] * 3)
    behind = {name: fit(name, _LONGER * config.vae_steps) - nats[name] for name in ("scale1", "bottom", "up3")}
    note = ", ".join(f"{name} {nats[name]:.1f} ({short:+.2f} with more)" for name, short in behind.items())
    worst = max(behind.values())
    yield Row(
        "held-out nats short of convergence, the worst of scale1, bottom and up3",
        f"{_LONGER} times the steps",
        0.5,
        *[worst] * 3,
        note,
    )


if __name__ == "__main__":
    report(rows())
