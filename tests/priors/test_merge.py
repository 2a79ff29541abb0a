"""Merging of priors: equal to a fit to the kernels of all sites, for a Gaussian exactly."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dwp_pyro.densities import BlockKernels
from dwp_pyro.densities.fit_density import fit_density
from dwp_pyro.densities.gaussian import fold_moments, gaussian_of
from dwp_pyro.densities.moments import Moments
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.priors.merge import merge_priors
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.priors.pack import MOMENTS, read_moments, save_pack
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.tensors import load_tensors, save_tensors
from tests.conftest import random_density

SHAPE = (2, 3)


def fitted(family: str, kernels: Tensor):
    """Fit a density to kernels of two source networks."""
    block = BlockKernels(kernels, torch.arange(len(kernels)) % 2, torch.arange(len(kernels)))
    return fit_density(family, block, 40, 0, {"latent_size": 2, "hidden": (8,)} if family == "dwp" else {})[0]


def pack(folder: Path, family: str, kernels: Tensor, **provenance: str) -> Path:
    blocks, infos = {"all": fitted(family, kernels)}, {"all": BlockInfo((ANY_SITE,), len(kernels))}
    save_pack(
        folder,
        KernelPrior(family, blocks, infos, provenance),
        {"all": fold_moments(kernels, torch.arange(len(kernels)))},
    )
    return folder


def kernels_of_sites(sites: int) -> list[Tensor]:
    """Draw kernels of sites of different sizes, means and scales."""
    density = random_density("mixture", SHAPE).float()
    return [density.rsample([100 + 50 * site]) * (1 + 0.1 * site) + 0.05 * site for site in range(sites)]


@pytest.mark.parametrize("sites", [2, 7])
def test_a_merged_gaussian_is_the_fit_to_all_kernels(tmp_path, sites):
    """To rounding, the shrinkage included: kernels are in the folds of their site."""
    kernels = kernels_of_sites(sites)
    folders = [pack(tmp_path / f"site{number}", "gaussian", each) for number, each in enumerate(kernels)]
    merged, moments = merge_priors(folders)
    folds = torch.cat([torch.arange(len(each)) for each in kernels]) % 5
    together = gaussian_of(fold_moments(torch.cat(kernels), folds))
    density = merged.block("all")
    assert_close(density.loc, together.loc.float())
    assert_close(density.scale_tril, together.scale_tril.float())
    assert merged.block_infos["all"] == BlockInfo((ANY_SITE,), sum(map(len, kernels)))
    assert_close(reduce(Moments.__add__, moments["all"]).scatter, Moments.of(torch.cat(kernels)).scatter)


def test_merging_in_two_steps_gives_the_same_moments(tmp_path):
    first, second, third = (
        pack(tmp_path / f"site{number}", "gaussian", each) for number, each in enumerate(kernels_of_sites(3))
    )
    save_pack(tmp_path / "both", *merge_priors([first, second]))
    in_steps, moments = merge_priors([tmp_path / "both", third])
    at_once, expected = merge_priors([first, second, third])
    for fold, same in zip(moments["all"], expected["all"], strict=True):
        assert_close(fold.scatter, same.scatter)
    assert_close(in_steps.block("all").scale_tril, at_once.block("all").scale_tril)


@pytest.mark.parametrize(
    "family", ["mixture", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "dwp"))]
)
def test_another_family_is_as_good_as_a_fit_to_all_kernels(tmp_path, family):
    """Within half a nat per kernel on kernels of all sites that no fit has seen."""
    kernels = [each.repeat(8, 1, 1) + 0.05 * torch.randn(8 * len(each), *SHAPE) for each in kernels_of_sites(3)]
    fit, held_out = [each[::2] for each in kernels], torch.cat([each[1::2] for each in kernels])
    merged, _ = merge_priors([pack(tmp_path / f"site{number}", family, each) for number, each in enumerate(fit)])
    together = fitted(family, torch.cat(fit))
    nats = [float(each.log_prob_estimate(held_out, 50).mean()) for each in (merged.block("all"), together)]
    assert abs(nats[0] - nats[1]) < 0.5


def test_priors_are_sampled_in_proportion_to_their_kernels(tmp_path, monkeypatch):
    blocks = []

    def fit(family, block, *settings):
        blocks.append(block)
        return random_density("mixture", SHAPE), {}

    monkeypatch.setattr("dwp_pyro.priors.merge._MAX_SAMPLES", 40)
    folders = [pack(tmp_path / f"site{n}", "mixture", each) for n, each in enumerate(kernels_of_sites(4))]
    monkeypatch.setattr("dwp_pyro.priors.merge.fit_density", fit)
    merge_priors(folders)
    (block,) = blocks
    assert abs(len(block) - 40) <= 1
    for site, count in enumerate(torch.bincount(block.bootstraps).tolist()):  # of 100, 150, 200 and 250 kernels
        assert abs(count - 40 * (100 + 50 * site) / 700) <= 1


def test_the_card_names_all_parents(tmp_path):
    kernels = kernels_of_sites(2)
    folders = [
        pack(tmp_path / "oslo", "gaussian", kernels[0], source="Oslo", license="CC BY 4.0"),
        pack(tmp_path / "lima", "gaussian", kernels[1], source="Lima"),
    ]
    save_pack(tmp_path / "merged", *merge_priors(folders))
    rows = dict(model_card(KernelPrior.load(tmp_path / "merged"))[0].rows)
    assert rows["merged from"] == "oslo, lima"
    assert "No kernels were held out" in (tmp_path / "merged" / "card.md").read_text()
    assert rows["source"] == "Oslo, Lima"
    assert rows["license"] == "CC BY 4.0, not stated"
    assert sum(fold.count for fold in read_moments(tmp_path / "merged")["all"]) == 250


def test_parents_of_one_name_are_told_apart_without_their_paths(tmp_path):
    folders = [
        pack(tmp_path / site / "prior-ms", "gaussian", kernels)
        for site, kernels in zip(("oslo", "lima"), kernels_of_sites(2), strict=True)
    ]
    assert merge_priors(folders)[0].provenance["parents"] == ["oslo/prior-ms", "lima/prior-ms"]


def test_priors_that_do_not_fit_are_named(tmp_path):
    kernels = kernels_of_sites(1)[0]
    good = pack(tmp_path / "good", "gaussian", kernels)
    with pytest.raises(PriorError, match=r"mixture: is of the family 'mixture', .*good of 'gaussian'"):
        merge_priors([good, pack(tmp_path / "mixture", "mixture", kernels)])
    with pytest.raises(PriorError, match=r"turned: has the blocks .*\(3, 2\)"):
        merge_priors([good, pack(tmp_path / "turned", "gaussian", kernels.transpose(1, 2))])
    other = pack(tmp_path / "other", "gaussian", kernels)
    (other / MOMENTS).write_bytes((pack(tmp_path / "small", "gaussian", kernels[:, :1]) / MOMENTS).read_bytes())
    with pytest.raises(PriorError, match=r"other: moments.safetensors does not fit prior.json; fit the prior again"):
        merge_priors([good, other])
    (other / MOMENTS).unlink()
    with pytest.raises(PriorError, match=r"other: holds no moments of its kernels .*fit the prior again"):
        merge_priors([good, other])
    with pytest.raises(PriorError, match="prior.json"):
        merge_priors([good, tmp_path / "nowhere"])


@pytest.mark.parametrize(
    "counts", [None, 3, {"all": "many"}, {"all": [0]}, {"all": [5.5]}, {"other": [2]}, {"all": [1] * 9}]
)
def test_damaged_moments_are_named(tmp_path, counts):
    folder = pack(tmp_path / "site", "gaussian", kernels_of_sites(1)[0])
    tensors, _ = load_tensors(folder / MOMENTS)
    save_tensors(folder / MOMENTS, tensors, {"counts": counts})
    with pytest.raises(PriorError, match="is not a file of moments"):
        read_moments(folder)


@pytest.mark.parametrize("damage", [lambda t: t.float(), lambda t: -t, lambda t: t + torch.randn_like(t)])
def test_a_scatter_that_no_kernels_have_is_named(tmp_path, damage):
    folder = pack(tmp_path / "site", "gaussian", kernels_of_sites(1)[0])
    tensors, metadata = load_tensors(folder / MOMENTS)
    tensors["all.0.scatter"] = damage(tensors["all.0.scatter"])
    save_tensors(folder / MOMENTS, tensors, metadata)
    with pytest.raises(PriorError, match="is not a file of moments"):
        read_moments(folder)


def test_a_pack_holds_no_kernels(tmp_path):
    """Four files; the moments are sums, of a size that does not depend on the number of kernels."""
    few, many = (pack(tmp_path / str(n), "gaussian", torch.randn(n, *SHAPE)) for n in (100, 1000))
    for folder in (few, many):
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["card.md", MOMENTS, "prior.json", "prior.safetensors"]
    assert abs((few / MOMENTS).stat().st_size - (many / MOMENTS).stat().st_size) < 16
    assert json.loads((few / "prior.json").read_text())["blocks"]["all"]["kernels"] == 100
