"""Kernel priors: round trip to disk and errors for damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from dwp_pyro.densities import DENSITIES, KernelGaussian, KernelVAE
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.runtime.errors import PriorError
from tests.conftest import random_density


@pytest.fixture
def prior() -> KernelPrior:
    blocks = {"first": KernelVAE((3, 3, 3), 2, (4, 5)), "second": KernelVAE((3, 3), 3, ())}
    for parameter in blocks["first"].parameters():
        torch.nn.init.normal_(parameter)
    blocks["first"].standardize_by(torch.randn(27), torch.eye(27) + 0.1 * torch.randn(27, 27).tril(-1))
    block_infos = {
        "first": BlockInfo(("input.weight", "down1.conv1.weight"), 10, {"prior": 1.5, "full_gaussian": 1.25}),
        "second": BlockInfo(("down2.weight",), 20),
    }
    return KernelPrior("dwp", blocks, block_infos, {"dataset": "ms", "bootstraps": [0, 1]})


@pytest.fixture
def folder(prior: KernelPrior, tmp_path: Path) -> Path:
    prior.save(tmp_path / "prior")
    return tmp_path / "prior"


def test_round_trip(prior, folder):
    """Bit-identical densities, the same infos and provenance, frozen parameters."""
    loaded = KernelPrior.load(folder)
    state = loaded.state_dict()
    assert state.keys() == prior.state_dict().keys()
    for name, tensor in prior.state_dict().items():
        assert_close(state[name], tensor, rtol=0, atol=0)
    assert loaded.block_infos == prior.block_infos
    assert loaded.provenance == prior.provenance
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    kernels, noise = torch.randn(6, 3, 3, 3), torch.randn(2, 6, 2)
    assert_close(
        loaded.block("first").bound(kernels, noise), prior.block("first").bound(kernels, noise), rtol=0, atol=0
    )


@pytest.mark.parametrize("family", ["gaussian", "mixture", "flow"])
def test_round_trip_of_every_family(tmp_path, family):
    """Two blocks of different arguments: bit-identical densities and draws."""
    blocks = {"first": random_density(family).float(), "second": DENSITIES[family]((3, 3))}
    prior = KernelPrior(family, blocks, {name: BlockInfo((f"{name}.weight",), 4) for name in blocks})
    prior.save(tmp_path)
    loaded = KernelPrior.load(tmp_path)
    assert loaded.family == family
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name in blocks:
        assert loaded.block(name).init_args() == prior.block(name).init_args()
        kernels = torch.randn(6, *prior.block(name).kernel_shape)
        densities = [p.block(name).log_prob_estimate(kernels) for p in (loaded, prior)]
        assert_close(*densities, rtol=0, atol=0)
        drawn = []
        for p in (loaded, prior):
            torch.manual_seed(1)
            drawn.append(p.sample_at(f"{name}.weight", (2, 3, *kernels.shape[1:])))
        assert_close(*drawn, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gaussian", "mixture", "flow"])
def test_every_prior_contains_simpler_ones(family):
    """N(b, AAᵀ) of a block, and independent weights around 0 with the Gaussian's root mean square."""
    block = random_density(family, (2, 2))
    prior = KernelPrior(family, {"all": block}, {"all": BlockInfo((ANY_SITE,), 7, {"prior": 1.0})})
    assert prior.as_family(family) is prior
    kernels = torch.randn(5, 2, 2, dtype=torch.double)
    covariance = block.scale_tril @ block.scale_tril.T
    second_moment = (block.loc.square() + covariance.diagonal()).mean()
    expected = {
        "gaussian": MultivariateNormal(block.loc, covariance),
        "isotropic": MultivariateNormal(0 * block.loc, second_moment * torch.eye(4).double()),
    }
    for name, exact in expected.items():
        simpler = prior.as_family(name)
        assert simpler.block_infos == prior.block_infos
        assert not any(parameter.requires_grad for parameter in simpler.parameters())
        assert type(simpler.block("all")) is KernelGaussian
        assert_close(simpler.block("all").log_prob_estimate(kernels), exact.log_prob(kernels.flatten(1)))


def test_another_family_is_named_with_the_remedy(prior):
    with pytest.raises(PriorError, match=r"family 'dwp', not 'flow'.*fit a prior of the family 'flow'"):
        prior.as_family("flow")


def test_blocks_of_another_family_raise(prior):
    with pytest.raises(ValueError, match="every block of a 'flow' prior must be a KernelFlow"):
        KernelPrior("flow", dict(prior.blocks), prior.block_infos)


def test_the_description_states_the_scale_of_the_kernels(folder, prior):
    """Root mean square of a weight under the block's Gaussian N(b, AAᵀ), with the diagonal of AAᵀ computed directly."""
    block = prior.block("first")
    second_moment = block.loc**2 + (block.scale_tril @ block.scale_tril.T).diagonal()
    description = json.loads((folder / "prior.json").read_text())
    assert description["blocks"]["first"]["kernel_scale"] == pytest.approx(float(second_moment.mean().sqrt()), rel=1e-5)


def test_the_block_of_a_site(prior):
    """By the block's sites; draws have the site's shape."""
    assert prior.block_at("down1.conv1.weight", (8, 4, 3, 3, 3)) is prior.block("first")
    assert prior.block_at("down2.weight", (8, 4, 3, 3)) is prior.block("second")
    drawn = prior.sample_at("input.weight", (8, 4, 3, 3, 3))
    assert drawn.shape == (8, 4, 3, 3, 3)
    assert not drawn.requires_grad


def test_any_site_takes_kernels_without_names():
    vae = KernelVAE((3, 3, 3))
    prior = KernelPrior("dwp", {"all": vae}, {"all": BlockInfo((ANY_SITE,), 1)})
    assert prior.block_at("whatever.weight", (1, 1, 3, 3, 3)) is vae
    assert prior.assign_sites({"a.weight": "input"}) is prior
    with pytest.raises(PriorError, match="no block 'mine' for 'b.weight' \\(blocks: all\\)"):
        prior.assign_sites({"a.weight": "all", "b.weight": "mine"}, override=True)


def test_an_unknown_site_is_named(prior):
    with pytest.raises(PriorError, match=r"down9\.conv1\.weight.*first, second"):
        prior.block_at("down9.conv1.weight", (1, 1, 3, 3, 3))


def test_another_kernel_shape_is_named(prior):
    with pytest.raises(PriorError, match=r"'first'.*3×3×3.*'input\.weight'.*5×5×5"):
        prior.block_at("input.weight", (1, 1, 5, 5, 5))


def test_a_missing_prior_is_named(tmp_path):
    with pytest.raises(PriorError, match=r"nowhere.*fit-prior"):
        KernelPrior.load(tmp_path / "nowhere")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"format": None},
        {"family": "cauchy"},
        {"family": "flow"},
        {"blocks": []},
        {"blocks": {"first": {}}},
        {"provenance": 3},
    ],
    ids=str,
)
def test_another_format_or_description_is_named(folder, changes):
    edit(folder / "prior.json", **changes)
    with pytest.raises(PriorError, match=r"prior\.json"):
        KernelPrior.load(folder)


def test_a_description_of_another_network_is_named(folder):
    """The tensors are complete but do not fit these blocks."""
    blocks = json.loads((folder / "prior.json").read_text())["blocks"]
    blocks["first"]["form"]["latent_size"] = 7
    edit(folder / "prior.json", blocks=blocks)
    with pytest.raises(PriorError, match=r"prior\.safetensors.*prior\.json"):
        KernelPrior.load(folder)


@pytest.mark.parametrize("name", ["prior.json", "prior.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_named(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(PriorError, match=name):
        KernelPrior.load(folder)


def test_missing_tensors_are_named(folder):
    (folder / "prior.safetensors").unlink()
    with pytest.raises(PriorError, match=r"prior\.safetensors"):
        KernelPrior.load(folder)
