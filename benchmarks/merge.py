"""Time and memory of merging 10,000 priors of seven blocks of 3×3×3 kernels.

$ python -m benchmarks.merge [--priors 10000]
"""

from __future__ import annotations

import itertools
import resource
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.comparison import chosen
from dwp_pyro.densities import KernelGaussian
from dwp_pyro.densities.gaussian import fold_moments
from dwp_pyro.priors.blocks import BLOCKS
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.merge import merge_priors
from dwp_pyro.priors.pack import save_pack

_DISTINCT = 100


def main() -> None:
    count = chosen(priors=10_000).priors
    with tempfile.TemporaryDirectory() as folder:
        priors = [Path(folder) / f"site{number}" for number in range(count)]
        for prior, of in zip(priors[_DISTINCT:], itertools.cycle(priors[:_DISTINCT]), strict=False):
            prior.symlink_to(of)
        for prior in priors[:_DISTINCT]:
            kernels = torch.randn(50, 3, 3, 3)
            density = KernelGaussian((3, 3, 3))
            density.standardize_by(kernels.flatten(1).mean(0), torch.eye(27))
            infos = {block: BlockInfo((f"{block}.weight",), len(kernels)) for block in BLOCKS}
            pack = KernelPrior("gaussian", dict.fromkeys(BLOCKS, density), infos)
            save_pack(prior, pack, dict.fromkeys(BLOCKS, fold_moments(kernels, torch.arange(len(kernels)))))
        start = time.monotonic()
        merge_priors(priors)
        seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count} priors merged in {seconds:.0f} s (target 600 s), with {memory:.2f} GiB (target 1 GiB)")


if __name__ == "__main__":
    main()
