"""Membership tests: was this network in the prior, and this scan in the training of a network or of a prior?

$ python studies/privacy/membership.py networks runs/generated/kernels.safetensors
$ python studies/privacy/membership.py scans runs/generated

Each line is a test: its area under the ROC curve and a 95 % interval by the bootstrap over networks, or over patients.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import MultivariateNormal

from dwp_pyro.config.training import FitPriorConfig
from dwp_pyro.data.preprocessing import Example
from dwp_pyro.densities import BlockKernels
from dwp_pyro.densities.fit_density import fit_density
from dwp_pyro.densities.gaussian import fold_moments, gaussian_of
from dwp_pyro.densities.moments import Moments
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.inference.predictive import posterior_mean_probability
from dwp_pyro.metrics.overlap import dice
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.blocks import by_block, kernel_sites, prior_blocks
from dwp_pyro.training.fit_prior import blocks_of
from dwp_pyro.training.source_networks import bootstrap_cases
from dwp_pyro.training.training_data import load_training_data

Array = NDArray[np.float64]
Blocks = Mapping[str, BlockKernels]


def area(wins: Array, pairs: Array, units: Array, draws: int = 2000) -> str:
    """Return the AUC of scores and its interval.

    Args:
        wins: Comparisons won by member i over non-member j, [n, n]; or of one scan with and without it, [n].
        pairs: Comparisons made, of the same shape.
        units: Network or patient that index i belongs to, [n].
        draws: Bootstrap samples of the units.
    """
    random = np.random.default_rng(0)
    names, positions = np.unique(units, return_inverse=True)
    areas = []
    for _ in range(draws):
        weights = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[positions]
        won, made = (weights @ each @ weights if each.ndim == 2 else weights @ each for each in (wins, pairs))
        areas.append(won / made if made else np.nan)
    low, high = np.nanquantile(areas, [0.025, 0.975])
    return f"{wins.sum() / pairs.sum():.2f} ({low:.2f} to {high:.2f})"


def compare(scores: Array, member: NDArray[np.bool_], known: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return wins and pairs, [n, n], of members over non-members, among those with a known score."""
    pairs = np.outer(member & known, ~member & known).astype(float)
    difference = np.where(known, scores, 0.0)[:, None] - np.where(known, scores, 0.0)
    return pairs * ((difference > 0) + 0.5 * (difference == 0)), pairs


def networks(path: Path, size: int, repetitions: int, families: Sequence[str]) -> None:
    """Test the membership of networks in priors of `size` networks, drawn from a bank."""
    bank = read_kernels(path)
    blocks = {name: bank.block(sites) for name, sites in blocks_of(bank, None).items()}
    numbers = np.unique(next(iter(blocks.values())).bootstraps)
    if len(numbers) < size + 3:  # the attacker needs two others
        raise SystemExit(f"{path}: holds {len(numbers)} networks, a test of priors of {size} needs {size + 3}")
    of_network = [{name: block[block.bootstraps == int(n)] for name, block in blocks.items()} for n in numbers]
    folds = [{name: fold_moments(b.kernels, b.identities) for name, b in each.items()} for each in of_network]
    moments = [{name: reduce(Moments.__add__, parts) for name, parts in each.items()} for each in folds]
    vectors = torch.stack([torch.cat([second_moments(m) for m in each.values()]) for each in moments])
    sums: dict[str, list[Array]] = {}
    for repetition in range(repetitions):
        order = np.random.default_rng([repetition, size]).permutation(len(numbers))
        member = np.isin(np.arange(len(numbers)), order[:size])
        inside, others = np.flatnonzero(member), np.flatnonzero(~member)
        chosen = torch.as_tensor(numbers[inside])
        pack = {name: block[torch.isin(block.bootstraps, chosen)] for name, block in blocks.items()}
        # The attacker has other networks, as many for a member as for a non-member, and never the one in question.
        references = [others[others != (n if n in others else others[0])] for n in range(len(numbers))]
        fits = [gaussians([folds[k] for k in of]) for of in references]
        ordinary = np.array([log_density(fit, each) for fit, each in zip(fits, moments, strict=True)])
        scores: dict[str, Array] = {}
        for family in families:
            if family == "gaussian":
                fit = gaussians([folds[k] for k in inside])
                density = np.array([log_density(fit, each) for each in moments])
            elif repetition < 3:
                density = fitted_density(family, pack, of_network)
            else:
                continue
            scores[f"{family}: log-density"] = density
            scores[f"{family}: log-density, less that of a prior of other networks"] = density - ordinary
        products = []
        for n, of in enumerate(references):
            center, spread = vectors[of].mean(0), vectors[of].std(0)
            shifts = (vectors[n] - center) / spread, (vectors[inside].mean(0) - center) / spread
            products.append(float(shifts[0] @ shifts[1]))
        scores["moments: inner product of the deviations from other networks"] = np.array(products)
        for name, score in scores.items():
            pair = compare(score, member, np.full(len(numbers), True))
            sums[name] = [one + other for one, other in zip(sums.get(name, (0, 0)), pair, strict=True)]
    print(f"{path}: priors of {size} of {len(numbers)} networks, {repetitions} draws")
    for name, (wins, pairs) in sums.items():
        print(f"  {name}: {area(wins, pairs, numbers)}")


def scans(run: Path, size: int, repetitions: int) -> None:
    """Test the membership of scans in the training of source networks, and of Gaussian priors of `size` of them."""
    config = FitPriorConfig.from_yaml(run / "config.yaml")
    data = load_training_data(config, None)
    folders = sorted((run / "source").glob("bootstrap*"), key=lambda folder: int(folder.name[9:]))
    folders = [folder for folder in folders if (folder / f"snapshot{config.snapshots - 1}.json").exists()]
    examples = (*data.train, *data.validation)
    patients = np.unique([data.patients[example.id] for example in examples], return_inverse=True)[1]
    member, loss, overlap, moments = [], [], [], []
    for folder in folders:
        bag = bootstrap_cases(data, config.seed, int(folder.name[9:]))
        member.append(np.isin([example.id for example in examples], [example.id for example in bag]))
        posterior = Posterior.load(folder / f"snapshot{config.snapshots - 1}.safetensors")
        results = [evaluate(posterior, example) for example in examples]
        loss.append([result[0] for result in results])
        overlap.append([result[1] for result in results])
        network = posterior.members[0].network
        weights = kernel_sites(network)
        moments.append(
            {
                name: Moments.of(torch.cat([weights[site].flatten(0, 1) for site in sites]))
                for name, sites in by_block(prior_blocks(network)).items()
            }
        )
    inside, losses = np.array(member), np.array(loss)
    without = np.where(inside, np.nan, losses)
    others = np.full_like(losses, np.nan)
    for k in range(len(folders)):
        rest = np.delete(without, k, 0)
        counted = (~np.isnan(rest)).sum(0)
        others[k] = np.where(counted, np.nansum(rest, 0), np.nan) / np.maximum(counted, 1)
    print(f"{run}: {len(folders)} networks, {len(examples)} scans of {patients.max() + 1} patients")
    tests = {
        "network: cross-entropy": -losses,
        "network: Dice": np.array(overlap),
        "network: cross-entropy, less that of networks without the scan": others - losses,
    }
    for name, scores in tests.items():
        pair = [compare(score, of, ~np.isnan(score)) for score, of in zip(scores, inside, strict=True)]
        print(f"  {name}: {area(sum(w for w, _ in pair), sum(p for _, p in pair), patients)}")
    priors_of_scans(moments, inside, patients, size, repetitions)


def priors_of_scans(
    moments: Sequence[Mapping[str, Moments]], inside: NDArray[np.bool_], patients: Array, size: int, repetitions: int
) -> None:
    """Compare priors of networks that all have a scan with priors of networks that all lack it.

    The attacker has trained other networks with the scan and without it.

    Args:
        moments: Moments of each network's blocks.
        inside: Whether a network has a scan in its bag, [networks, scans].
        patients: Patient of each scan.
        size: Networks per prior.
        repetitions: Random halves of the networks, one for priors and one for the attacker.
    """
    vectors = torch.stack([torch.cat([second_moments(m) for m in each.values()]) for each in moments])
    density, discriminant, pairs = (np.zeros(inside.shape[1]) for _ in range(3))
    for repetition in range(repetitions):
        order = np.random.default_rng(repetition).permutation(len(moments))
        for scan, of_scan in enumerate(inside.T):
            priors = [part[:size] for part in (order[::2][of_scan[order[::2]]], order[::2][~of_scan[order[::2]]])]
            shadows = order[1::2][of_scan[order[1::2]]], order[1::2][~of_scan[order[1::2]]]
            if min(map(len, priors)) < size or min(map(len, shadows)) < 2:
                continue
            direction = vectors[shadows[0]].mean(0) - vectors[shadows[1]].mean(0)
            direction /= vectors[order[1::2]].var(0)
            scores = []
            for prior in priors:
                fit = {name: gaussian_of([moments[k][name] for k in prior]) for name in moments[0]}
                ratio = [np.mean([log_density(fit, moments[k]) for k in part]) for part in shadows]
                scores.append((ratio[0] - ratio[1], float(vectors[prior].mean(0) @ direction)))
            pairs[scan] += 1
            density[scan] += scores[0][0] > scores[1][0]
            discriminant[scan] += scores[0][1] > scores[1][1]
    if not pairs.any():
        print("  prior: too few networks with and without a scan")
        return
    print(f"  prior: log-density of networks with the scan, less that without: {area(density, pairs, patients)}")
    print(f"  prior: linear discriminant of second moments: {area(discriminant, pairs, patients)}")


def second_moments(moments: Moments) -> Tensor:
    """Return the upper triangle of the mean of w wᵀ, and the mean of w."""
    size = len(moments.mean)
    square = moments.scatter_about(torch.zeros(size, dtype=torch.float64)) / moments.count
    return torch.cat([square[tuple(torch.triu_indices(size, size))], moments.mean])


def gaussians(parts: Sequence[Mapping[str, Sequence[Moments]]]) -> dict[str, MultivariateNormal]:
    """Fit a Gaussian to each block of some networks, from the folds of each, as `merge-prior` does."""
    return {
        name: gaussian_of([reduce(Moments.__add__, fold) for fold in zip(*(part[name] for part in parts), strict=True)])
        for name in parts[0]
    }


def log_density(fit: Mapping[str, MultivariateNormal], moments: Mapping[str, Moments]) -> float:
    """Return the mean log-density of a network's kernels, from their moments."""
    total = 0.0
    for name, each in moments.items():
        gaussian = fit[name]
        square = torch.cholesky_solve(each.scatter_about(gaussian.loc), gaussian.scale_tril).trace()
        total += float(each.count * gaussian.log_prob(gaussian.loc) - 0.5 * square)
    return total / sum(each.count for each in moments.values())


@torch.no_grad()
def fitted_density(family: str, pack: Blocks, of_network: Sequence[Blocks]) -> Array:
    """Return the mean log-density of each network's kernels under a density of another family."""
    totals = np.zeros(len(of_network))
    for name, block in pack.items():
        with torch.enable_grad():
            density, _ = fit_density(family, block, 500, seed=0)
        for number, each in enumerate(of_network):
            totals[number] += float(density.log_prob_estimate(each[name].kernels, 20).double().sum())
    return totals / np.array([sum(map(len, each.values())) for each in of_network])


def evaluate(posterior: Posterior, example: Example) -> tuple[float, float]:
    """Return the mean cross-entropy over the brain in nats, and the Dice of the first region."""
    assert example.label is not None
    brain = example.brain_mask[0].numpy() == 1
    truth = example.label[0].numpy()[brain] == 1
    inside = posterior_mean_probability(posterior, example.image.as_tensor())[0].numpy()[brain].clip(1e-6, 1 - 1e-6)
    return float(-np.log(np.where(truth, inside, 1 - inside)).mean()), dice(inside > 0.5, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("test", choices=("networks", "scans"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--members", type=int, default=3, help="networks per prior")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--families", default="gaussian,mixture,dwp")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.test == "scans":
        scans(arguments.path, arguments.members, arguments.repetitions)
    else:
        networks(arguments.path, arguments.members, arguments.repetitions, arguments.families.split(","))


if __name__ == "__main__":
    main()
