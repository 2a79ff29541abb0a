"""Time and quality of VAE priors of seven blocks, fitted to 200,000 kernels.

The kernels are drawn from the mixtures of an example study, so that their density is known.

$ python -m benchmarks.priors
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.comparison import Row, report
from dwp_pyro.config.training import FitPriorConfig
from dwp_pyro.densities import BlockKernels
from dwp_pyro.densities.fit_density import fit_density
from dwp_pyro.priors.kernel_prior import KernelPrior

_PRIOR = Path(__file__).parents[1] / "studies/archive/whole-tumour/priors/mixture"
_KERNELS, _BOOTSTRAPS = 200_000, 5
_LONGER = 4  # factor on the steps that defines convergence


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    mixture = KernelPrior.load(_PRIOR)
    total = sum(info.kernels for info in mixture.block_infos.values())
    blocks = {}
    for name, info in mixture.block_infos.items():
        # In proportion to the blocks, but at least 2000 each: about 200,000 in total.
        count = max(2000, round(_KERNELS * info.kernels / total)) // _BOOTSTRAPS * _BOOTSTRAPS
        kernels = mixture.block(name).rsample([count])
        blocks[name] = BlockKernels(kernels, torch.arange(count) % _BOOTSTRAPS, torch.arange(count))
    config = FitPriorConfig()

    def fit(name: str, steps: int) -> float:
        form = {"latent_size": config.latent_size, "hidden": config.hidden}
        return fit_density("dwp", blocks[name], steps, 0, form)[1]["prior"]

    start = time.perf_counter()
    nats = {name: fit(name, config.density_steps) for name in blocks}
    minutes = (time.perf_counter() - start) / 60
    made = sum(map(len, blocks.values()))
    yield Row(f"minutes to fit the seven VAE priors to {made:,} kernels", "3 minutes", 3, *[minutes] * 3)
    gaps = {name: fit(name, _LONGER * config.density_steps) - nats[name] for name in ("scale1", "bottom", "up3")}
    note = ", ".join(f"{name} {nats[name]:.1f} ({gap:+.2f} with more steps)" for name, gap in gaps.items())
    worst = max(gaps.values())
    yield Row(
        "held-out nats below convergence, worst of scale1, bottom and up3",
        f"{_LONGER} times the steps",
        0.5,
        *[worst] * 3,
        note,
    )


if __name__ == "__main__":
    report(rows())
