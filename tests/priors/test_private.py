"""Private priors: calibration and sensitivity by brute force, the noise, and what the files of a pack reveal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.testing import assert_close

from dwp_pyro.densities import BlockKernels
from dwp_pyro.densities.gaussian import FOLDS, gaussian_of
from dwp_pyro.densities.moments import Moments
from dwp_pyro.priors.bank import KernelBank, KernelSource
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.merge import merge_priors
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.priors.pack import MOMENTS, read_moments, save_pack
from dwp_pyro.priors.private import clipped_contributions, noise_multiplier, noisy_moments, private_moments
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.tensors import load_tensors, save_tensors
from tests.world import call

NETWORKS, SNAPSHOTS = 4, 2


def blocks_of(kernels: dict[str, Tensor]) -> dict[str, BlockKernels]:
    """Arrange kernels of two snapshots, block → [networks, snapshots, places, k₁, k₂]."""
    blocks = {}
    for name, each in kernels.items():
        networks, snapshots, places = each.shape[:3]
        bootstraps = torch.arange(networks).repeat_interleave(snapshots * places)
        identities = bootstraps * places + torch.arange(places).repeat(networks * snapshots)
        blocks[name] = BlockKernels(each.flatten(0, 2), bootstraps, identities)
    return blocks


def random_kernels(networks: int = NETWORKS) -> dict[str, Tensor]:
    scales = {"input": 0.3, "bottom": 0.1}
    return {
        name: scales[name] * torch.randn(networks, SNAPSHOTS, places, 2, 3)
        for name, places in (("input", 12), ("bottom", 40))
    }


def total(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.sum(0).flatten() for x in vectors.values()])


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_the_noise_is_calibrated(epsilon, delta):
    """δ = ∫ max(0, p − e^ε q) for Gaussians one sensitivity apart, by numerical integration."""
    sigma = noise_multiplier(epsilon, delta)
    start = sigma**2 * epsilon + 0.5  # where p = e^ε q

    def excess(x: float) -> float:
        return norm.pdf(x, 1, sigma) - math.exp(epsilon + norm.logpdf(x, 0, sigma))

    integral, error = quad(excess, start, start + 12 * sigma, epsabs=1e-13)
    assert integral == pytest.approx(delta, rel=1e-4), error


def test_the_noise_grows_with_privacy_and_stays_below_the_classical_one():
    """The classical mechanism, √(2 log 1.25/δ) / ε, holds for ε below 1 (Dwork & Roth 2014, theorem A.1)."""
    multipliers = [noise_multiplier(epsilon, 1e-5) for epsilon in (8.0, 3.0, 1.0, 0.5)]
    assert multipliers == sorted(multipliers)
    assert noise_multiplier(0.5, 1e-5) < math.sqrt(2 * math.log(1.25e5)) / 0.5
    assert noise_multiplier(1.0, 1e-5) == pytest.approx(3.73, abs=0.01)


@pytest.mark.parametrize("clip", [1e-3, 0.05, 100.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_replacing_a_network_changes_the_sums_by_at_most_the_bound(clip, size):
    kernels = random_kernels()
    before = total(clipped_contributions(blocks_of(kernels), clip))
    for network in range(NETWORKS):
        other = {name: each.clone() for name, each in kernels.items()}
        for name, each in random_kernels(1).items():
            other[name][network] = size * each[0]
        change = total(clipped_contributions(blocks_of(other), clip)) - before
        assert change.norm() <= math.sqrt(2) * clip * (1 + 1e-9)


def test_the_bound_is_attained():
    """By networks of orthogonal kernels beyond the clip."""
    weights = torch.eye(6).reshape(6, 1, 1, 1, 2, 3)
    one, other = (100 * weights[place].expand(1, SNAPSHOTS, 10, 2, 3) for place in (0, 1))
    sums = [total(clipped_contributions(blocks_of({"input": each}), 0.5)) for each in (one, other)]
    assert_close((sums[0] - sums[1]).norm(), torch.tensor(math.sqrt(2) * 0.5).double())


def test_the_noise_has_its_mean_and_standard_deviation():
    """Within 4 standard errors, and symmetric: variance half as large off the diagonal."""
    blocks = blocks_of(random_kernels())
    vectors = clipped_contributions(blocks, 0.2)
    exact = noisy_moments(blocks, vectors, 0.0, np.random.default_rng(0))["bottom"]
    random, draws = np.random.default_rng(0), 2000
    drawn = [private_moments(blocks, 1.0, 1e-5, 0.2, random)["bottom"] for _ in range(draws)]
    sigma = math.sqrt(2) * 0.2 * noise_multiplier(1.0, 1e-5) * SNAPSHOTS * math.sqrt(40)  # n / √m = 80 / √40
    expected = sigma * torch.where(torch.eye(6).bool(), 1.0, math.sqrt(0.5)).double()
    for fold in range(FOLDS):
        noise = torch.stack([each[fold].scatter for each in drawn]) - exact[fold].scatter
        assert_close(noise, noise.mT)
        assert (noise.mean(0).abs() < 4 * expected / math.sqrt(draws)).all()
        assert ((noise.std(0) / expected - 1).abs() < 4 / math.sqrt(2 * draws)).all()


def test_no_noise_gives_the_fit_to_the_second_moments_of_clipped_kernels():
    kernels, clip = random_kernels(), 0.2
    blocks = blocks_of(kernels)
    private = private_moments(blocks, 1e14, 1e-5, clip, np.random.default_rng(0))
    norms = sum(x.square().sum((1, 2, 3)) for x in clipped_contributions(blocks, 1e9).values()).sqrt()
    assert (norms > clip).any()
    factors = (clip / norms).clamp_max(1).sqrt().float()
    for name, of_name in blocks_of(
        {n: each * factors[:, None, None, None, None] for n, each in kernels.items()}
    ).items():
        plain = []
        for fold in range(FOLDS):
            flat = of_name.kernels[of_name.identities % FOLDS == fold].flatten(1).double()
            plain.append(Moments(len(flat), torch.zeros(6).double(), flat.T @ flat))
        assert [each.count for each in private[name]] == [each.count for each in plain]
        # At this ε the noise is 1e-7 of the clip.
        assert_close(
            gaussian_of(private[name]).covariance_matrix, gaussian_of(plain).covariance_matrix, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_projected_moments_are_the_nearest_of_the_same_trace(noise):
    flat = torch.randn(30, 5).double()
    drawn = noise * torch.randn(5, 5).double()
    moments = Moments(30, torch.zeros(5).double(), flat.T @ flat / 30 + drawn + drawn.T)
    projected = moments.projected().scatter
    values = torch.linalg.eigvalsh(moments.scatter)
    trace = max(float(values.sum()), float(values[-1]))
    assert float(projected.trace()) == pytest.approx(trace)
    assert torch.linalg.eigvalsh(projected)[0] > -1e-9 * trace
    if values[0] >= 0:
        assert projected is moments.scatter
    distance = (projected - moments.scatter).norm()
    for _ in range(200):  # mixtures with any such matrix are not nearer
        root = torch.randn(5, 5).double()
        other = root @ root.T * (trace / root.square().sum())
        assert ((0.9 * projected + 0.1 * other) - moments.scatter).norm() >= distance - 1e-9


def test_noise_without_a_positive_eigenvalue_gives_a_proper_density():
    fold = Moments(5, torch.zeros(3).double(), -torch.eye(3).double())
    assert gaussian_of([fold, fold]).log_prob(torch.zeros(3).double()).isfinite()


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Save a bank of 3×3×3 kernels of four networks, each of two snapshots."""
    sources = tuple(
        KernelSource(n, s, "openms", {}, 0.123456, 0.654321) for n in range(NETWORKS) for s in range(SNAPSHOTS)
    )
    KernelBank({"w": 0.1 * torch.randn(len(sources) * 30, 3, 3, 3)}, sources).save(tmp_path / "bank")
    return tmp_path / "bank" / "kernels.safetensors"


def fit(bank: Path, out: Path, *options: object):
    return call("fit-prior", "--kernels", bank, "--out", out, *options)


def test_a_private_pack_holds_nothing_exact(bank, tmp_path):
    """Neither scores of networks nor held-out nats; its density is the fit to its noisy moments."""
    out = tmp_path / "prior"
    result = fit(bank, out, "--family", "gaussian", "--epsilon", 2, "--delta", 1e-4)
    assert result.exit_code == 0, result.output
    prior, moments = KernelPrior.load(out), read_moments(out)
    (name,) = prior.block_infos
    expected = gaussian_of(moments[name])
    assert_close(prior.block(name).scale_tril, expected.scale_tril.float())
    assert not prior.block(name).loc.any()
    text = (out / "prior.json").read_text() + (out / "card.md").read_text()
    assert "0.123" not in text and "0.654" not in text
    assert json.loads((out / "prior.json").read_text())["blocks"][name]["nats_per_kernel"] == {}
    assert "(2, 0.0001)-differentially private; unit: one source network" in (out / "card.md").read_text()
    assert "clipped at 2" in dict(model_card(prior)[0].rows)["privacy"]


def test_two_fits_with_one_seed_have_different_noise(bank, tmp_path):
    for name in ("one", "two"):
        assert fit(bank, tmp_path / name, "--family", "gaussian", "--epsilon", 2).exit_code == 0
    one, two = (KernelPrior.load(tmp_path / name) for name in ("one", "two"))
    (block,) = one.block_infos
    assert not one.block(block).scale_tril.equal(two.block(block).scale_tril)


@pytest.mark.parametrize("family", ["dwp", "mixture", "flow", "auto"])
def test_another_family_is_refused(bank, tmp_path, family):
    result = fit(bank, tmp_path / "prior", "--family", family, "--epsilon", 1)
    assert result.exit_code == 2
    assert f"epsilon: only a prior of the family 'gaussian' can be private, got '{family}'" in result.output
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("snapshots", [(), (0, 0, 1)], ids=["no networks", "unequal networks"])
def test_a_bank_of_unknown_or_unequal_networks_is_refused(tmp_path, snapshots):
    sources = tuple(KernelSource(network, n, "openms", {}, None) for n, network in enumerate(snapshots))
    KernelBank({"w": torch.randn(24, 3, 3, 3)}, sources).save(tmp_path / "bank")
    result = fit(tmp_path / "bank" / "kernels.safetensors", tmp_path / "prior", "--family", "gaussian", "--epsilon", 1)
    assert result.exit_code == 2
    assert "a private prior hides one source network" in result.output
    assert ("found no list" if not sources else "found [1, 2]") in result.output
    assert not (tmp_path / "prior").exists()


def test_private_packs_are_merged(bank, tmp_path):
    """Their noisy moments are added up without bias, and the merged card states their privacy."""
    folders = [tmp_path / name for name in ("oslo", "lima")]
    for folder in folders:
        assert fit(bank, folder, "--family", "gaussian", "--epsilon", 0.5).exit_code == 0
    save_pack(tmp_path / "merged", *merge_priors(folders))
    merged = read_moments(tmp_path / "merged")
    (name,) = merged
    for fold, *parts in zip(merged[name], *(read_moments(folder)[name] for folder in folders), strict=True):
        assert_close(fold.scatter, parts[0].scatter + parts[1].scatter)
    assert "(0.5, 1e-05)-differentially private" in (tmp_path / "merged" / "card.md").read_text()


def test_a_merged_card_states_the_privacy_of_each_parent(bank, tmp_path):
    for name, options in {"weak": ("--epsilon", 3), "strong": ("--epsilon", 0.5), "open": ()}.items():
        assert fit(bank, tmp_path / name, "--family", "gaussian", *options).exit_code == 0
    merged, _ = merge_priors([tmp_path / name for name in ("weak", "strong", "open")])
    statements = merged.provenance["privacy"]
    assert statements.startswith("(3, 1e-05)") and "(0.5, 1e-05)" in statements and statements.endswith(", not stated")


def test_a_scatter_with_negative_eigenvalues_needs_noise(bank, tmp_path):
    folder = tmp_path / "prior"
    assert fit(bank, folder, "--family", "gaussian", "--epsilon", 0.1).exit_code == 0
    moments = read_moments(folder)
    assert any(torch.linalg.eigvalsh(fold.scatter)[0] < 0 for folds in moments.values() for fold in folds)
    tensors, metadata = load_tensors(folder / MOMENTS)
    save_tensors(folder / MOMENTS, tensors, {**metadata, "noise": False})
    with pytest.raises(PriorError, match="a scatter that no kernels have"):
        read_moments(folder)
