"""Kernel banks: order, provenance, files."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import FitPriorConfig
from dwp_pyro.priors.bank import KernelBank, KernelSource, collect_kernels, read_kernels
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.training import fit_prior as module
from dwp_pyro.training.fit_prior import blocks_of, fit_prior


def source(bootstrap: int, snapshot: int) -> KernelSource:
    return KernelSource(bootstrap, snapshot, "ms", {"widths": [1, 2, 3, 4]}, 0.5)


@pytest.fixture
def bank() -> KernelBank:
    pairs = [
        (
            source(b, s),
            {"input.weight": torch.full((2, 3, 3, 3, 3), 10.0 * b + s), "up1.conv1.weight": torch.ones(1, 1, 3, 3, 3)},
        )
        for b in range(2)
        for s in range(3)
    ]
    return collect_kernels(pairs)


def test_kernels_keep_their_order_and_their_origin(bank):
    assert bank.kernels["input.weight"].shape == (36, 3, 3, 3)
    marks = bank.kernels["input.weight"][:, 0, 0, 0]
    assert torch.equal(bank.bootstraps("input.weight"), (marks // 10).long())
    identities = bank.identities("input.weight")
    assert len(identities.unique()) == 12
    # The three snapshots of a bootstrap share six identities.
    assert torch.equal(identities[:6], identities[6:12]) and torch.equal(identities[:6], identities[12:18])


def test_a_bank_survives_its_files(bank, tmp_path):
    bank.save(tmp_path)
    loaded = read_kernels(tmp_path / "kernels.safetensors")
    assert loaded.sources == bank.sources
    assert all(torch.equal(loaded.kernels[site], kernels) for site, kernels in bank.kernels.items())


@pytest.mark.parametrize("shape", [(5, 7, 7), (5, 1, 7, 7), (5, 3, 3, 3), (5, 1, 3, 3, 3)])
def test_arrays_are_read_with_and_without_a_channel(tmp_path, shape):
    array = np.random.default_rng(0).normal(size=shape)
    np.save(tmp_path / "k.npy", array)
    kernels = read_kernels(tmp_path / "k.npy").kernels["*"]
    assert kernels.shape == (5, *(side for side in shape[1:] if side > 1))
    np.testing.assert_allclose(kernels.numpy().ravel(), array.ravel(), rtol=1e-6)


def test_arrays_that_would_run_code_are_refused(tmp_path):
    path = tmp_path / "k.npy"
    np.save(path, np.array([print, print], dtype=object), allow_pickle=True)
    with pytest.raises(PriorError, match="k.npy: cannot be read"):
        read_kernels(path)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((5, 3)), "expected at least two kernels"),
        (np.ones((1, 3, 3)), "expected at least two kernels"),
        (np.full((5, 3, 3), np.nan), "NaN"),
        (np.zeros((5, 3, 3)), "every weight is 0"),
        (np.full((5, 3, 3), 1e25), "holds a weight of 1e\\+25, the limit is 1e\\+12"),
        (np.ones((3, 20, 20, 20)), "of 2 to 1331 weights"),
        (np.array(["a", "b"]), "one array of numbers"),
    ],
)
def test_invalid_arrays_are_named(tmp_path, array, says):
    np.save(tmp_path / "k.npy", array)
    with pytest.raises(PriorError, match=says) as caught:
        read_kernels(tmp_path / "k.npy")
    assert "k.npy" in str(caught.value)


def test_unknown_files_are_named(tmp_path):
    for name in ("k.pt", "missing.npy", "missing.safetensors"):
        with pytest.raises(PriorError, match=name):
            read_kernels(tmp_path / name)


def test_blocks_are_those_of_the_network_or_one_for_another(bank):
    assert blocks_of(bank, None) == {"input": ("input.weight",), "up1": ("up1.conv1.weight",)}
    foreign = KernelBank({"encoder.0.weight": torch.ones(4, 3, 3), "encoder.1.weight": torch.ones(4, 3, 3)})
    assert blocks_of(foreign, None) == {"all": ("encoder.0.weight", "encoder.1.weight")}
    mixed = KernelBank({"a": torch.ones(4, 3, 3), "b": torch.ones(4, 5, 5)})
    with pytest.raises(PriorError, match="3×3, 5×5"):
        blocks_of(mixed, None)


@pytest.mark.parametrize("listed", [True, False])
def test_a_block_has_kernels_of_one_shape(listed, tmp_path):
    """In a file of blocks, or under the names of the published network."""
    mixed = KernelBank({"input.weight": torch.ones(4, 3, 3, 3), "down1.conv1.weight": torch.ones(4, 5, 5, 5)})
    (tmp_path / "blocks.yaml").write_text("x: [input, down1]\n")
    with pytest.raises(PriorError, match="3×3×3, 5×5×5"):
        blocks_of(mixed, str(tmp_path / "blocks.yaml") if listed else None)


def test_a_bank_of_nine_down_blocks_keeps_the_blocks_of_the_network(bank):
    """With the description of an earlier version or with none: the sites are those of `paper-unet`."""
    sites = {name: torch.ones(6, 3, 3, 3) for name in ("input.weight", "down6.conv1.weight", "down9.conv2.weight")}
    expected = {"input": ("input.weight",), "bottom": ("down6.conv1.weight", "down9.conv2.weight")}
    for sources in (bank.sources, ()):
        assert blocks_of(KernelBank(sites, sources), None) == expected


def test_a_bank_of_one_kernel_or_with_a_bad_description_is_refused(bank, tmp_path):
    one = KernelBank({"input.weight": torch.randn(3, 3, 3, 3)}, tuple(source(0, s) for s in range(3)))
    one.save(tmp_path)
    with pytest.raises(PriorError, match="snapshots of one kernel"):
        read_kernels(tmp_path / "kernels.safetensors")
    no_network = asdict(source(0, 0)) | {"network": None}
    for change in ({"format": 99}, {"sources": [{"bootstrap": "x"}]}, {"sources": 3}, {"sources": [no_network]}):
        bank.save(tmp_path)
        network_config = json.loads((tmp_path / "kernels.json").read_text())
        (tmp_path / "kernels.json").write_text(json.dumps(network_config | change))
        with pytest.raises(PriorError, match="kernels.json"):
            read_kernels(tmp_path / "kernels.safetensors")


def test_kernels_of_two_sites_in_a_block_are_different_kernels(tmp_path, monkeypatch):
    """Snapshots of one kernel share a fold of the held-out density; kernels of two sites do not count as snapshots."""
    sites = {"up1.conv1.weight": torch.randn(6, 3, 3, 3), "up1.conv2.weight": torch.randn(12, 3, 3, 3)}
    KernelBank(sites, (source(0, 0), source(0, 1), source(1, 0))).save(tmp_path)
    seen = []
    fold_moments = module.fold_moments
    monkeypatch.setattr(module, "fold_moments", lambda kernels, of: seen.append(of) or fold_moments(kernels, of))
    config = FitPriorConfig(kernels=str(tmp_path / "kernels.safetensors"), family="gaussian")
    fit_prior(config, RunOptions(tmp_path / "out"))
    (identities,) = seen
    assert len(identities) == 18 and len(identities.unique()) == 2 * 2 + 2 * 4  # bootstraps × kernels of a network
