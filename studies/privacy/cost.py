"""What a private Gaussian prior costs: held-out nats per kernel by ε and number of source networks.

$ python studies/privacy/cost.py runs/prior-ms/kernels.safetensors

Each network in turn is held out. N networks are copies of the others: noise for N networks has the standard deviation
of K/N of that for the K that there are.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from membership import Blocks

from dwp_pyro.densities.gaussian import fold_moments, gaussian_of
from dwp_pyro.densities.moments import Moments
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.private import clipped_contributions, noise_multiplier, noisy_moments
from dwp_pyro.training.fit_prior import blocks_of

_EPSILONS, _NETWORKS, _DELTA = (1.0, 3.0, 8.0), (10, 100, 1000, 10_000), 1e-5


def nats(moments: dict[str, list[Moments]], test: Blocks) -> float:
    """Return the mean log-density of the held-out kernels under the fit to moments."""
    total = sum(float(gaussian_of(moments[n]).log_prob(b.kernels.flatten(1).double()).sum()) for n, b in test.items())
    return total / sum(map(len, test.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("--clip", type=float, default=2.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bank = read_kernels(arguments.bank)
    blocks = {name: bank.block(sites) for name, sites in blocks_of(bank, None).items()}
    numbers = next(iter(blocks.values())).bootstraps.unique().tolist()
    costs: dict[str, list[float]] = {}
    for number in numbers:
        train = {name: block[block.bootstraps != number] for name, block in blocks.items()}
        test = {name: block[block.bootstraps == number] for name, block in blocks.items()}
        plain = nats({name: fold_moments(block.kernels, block.identities) for name, block in train.items()}, test)
        costs.setdefault("plain, nats", []).append(plain)
        flat = {name: block.kernels.flatten(1).double() for name, block in train.items()}
        isotropic = {name: [Moments(len(w), torch.zeros(w.shape[1]).double(), w.T @ w)] for name, w in flat.items()}
        costs.setdefault("isotropic", []).append(nats(isotropic, test) - plain)
        vectors = clipped_contributions(train, arguments.clip)
        random = np.random.default_rng(number)
        costs.setdefault("clipped, no noise", []).append(nats(noisy_moments(train, vectors, 0.0, random), test) - plain)
        for epsilon in _EPSILONS:
            unit = math.sqrt(2) * arguments.clip * noise_multiplier(epsilon, _DELTA)
            for count in _NETWORKS:
                noisy = noisy_moments(train, vectors, unit * (len(numbers) - 1) / count, random)
                costs.setdefault(f"ε = {epsilon:g}, {count} networks", []).append(nats(noisy, test) - plain)
    for name, values in costs.items():
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        print(f"{name}: {np.mean(values):.2f} ± {error:.2f}", flush=True)


if __name__ == "__main__":
    main()
