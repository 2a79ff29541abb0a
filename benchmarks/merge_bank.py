"""Merged priors of sites that share the networks of a kernel bank, beside a fit to all their kernels.

The last bootstrap scores. The others are dealt out to the sites, each of which fits a prior of its own.

$ python -m benchmarks.merge_bank runs/prior-ms/kernels.safetensors --sites 2
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch

from dwp_pyro import FitPriorConfig, RunOptions, fit_prior
from dwp_pyro.evaluation.score_prior import score_prior
from dwp_pyro.priors.bank import KernelBank, read_kernels
from dwp_pyro.priors.merge import merge_priors
from dwp_pyro.priors.pack import save_pack


def of_bootstraps(bank: KernelBank, chosen: Collection[int]) -> KernelBank:
    kernels = {
        site: values[torch.isin(bank.bootstraps(site), torch.tensor(list(chosen)))]
        for site, values in bank.kernels.items()
    }
    return KernelBank(kernels, tuple(source for source in bank.sources if source.bootstrap in chosen))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bank", type=Path)
    parser.add_argument("--sites", default=2, type=int)
    parser.add_argument("--family", default=["gaussian", "mixture"], nargs="+")
    args = parser.parse_args()

    bank = read_kernels(args.bank)
    *rest, last = sorted({source.bootstrap for source in bank.sources})
    parts = {f"site{number}": rest[number :: args.sites] for number in range(args.sites)} | {
        "all": rest,
        "test": [last],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, bootstraps in parts.items():
            of_bootstraps(bank, bootstraps).save(folder / part)
        for family in args.family:
            priors = {}
            for part in parts.keys() - {"test"}:
                config = FitPriorConfig(kernels=str(folder / part / "kernels.safetensors"), family=family)
                priors[part] = folder / family / part
                fit_prior(config, RunOptions(priors[part]))
            merged = folder / family / "merged"
            save_pack(merged, *merge_priors([priors[part] for part in sorted(parts) if part.startswith("site")]))
            nats = {
                part: score_prior(prior, folder / "test" / "kernels.safetensors")["nats_per_kernel"]["prior"]
                for part, prior in sorted((priors | {"merged": merged}).items())
            }
            print(f"{family}:", ", ".join(f"{part} {value:.3f}" for part, value in nats.items()), "nats per kernel")


if __name__ == "__main__":
    main()
