"""What `svi` trains: where kernels and other weights start, what their priors are, and the null programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dwp_pyro.config import SviConfig
from dwp_pyro.distributions.kernel_prior import BlockCard, KernelPrior
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.models.blocks import kernel_sites, prior_blocks
from dwp_pyro.pipeline.svi import _nulls, _program
from dwp_pyro.pipeline.train_network import Program
from tests.conftest import random_density

CARD = NetworkCard(("flair",), ("lesion",), ((1,),), "openms", None, (16, 16, 16), widths=(2, 2, 3, 3))
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Gaussian prior, and two source networks."""
    blocks = prior_blocks(CARD.build())
    names = dict.fromkeys(blocks.values())
    cards = {name: BlockCard(tuple(site for site, block in blocks.items() if block == name), 9) for name in names}
    KernelPrior("gaussian", {name: random_density("gaussian").float() for name in names}, cards).save(tmp_path)
    Posterior(CARD, [Member(CARD.build(), None) for _ in range(2)]).save(tmp_path / "source.safetensors")
    return tmp_path


def built(folder: Path, member: int = 0, **settings: object) -> tuple[SviConfig, Program]:
    config = SviConfig(prior_from=str(folder), **{"prior": "gaussian", **settings}).resolved()
    return config, _program(config, CARD, CPU, member)


def test_the_prior_null_has_the_scales_of_the_fitted_program_and_their_hyperprior(folder):
    """Fixed: the same log p(c) as in the posterior's ELBO, and draws as wide as its prior."""
    config, fitted = built(folder, 1)
    scales = fitted.prior_modules["scales"]
    with torch.no_grad():
        scales.log_scales["c/up1"].add_(0.4)
    null = _nulls(config, CARD, CPU, 1, fitted)["prior"]
    assert null.guide is None and not any(p.requires_grad for p in null.prior_modules["scales"].parameters())
    assert_close(null.prior_modules["scales"].log_prob(), scales.log_prob().detach())
    assert scales.log_prob().item() < -1
    assert scales.log_scales["c/up1"].requires_grad
    source = Posterior.load(folder / "source.safetensors").members[1].network
    kernel_prior = null.prior_modules["kernel_prior"]
    for site in ("up1.conv1.weight", "up2.conv1.weight"):
        module = null.network.get_submodule(site.removesuffix(".weight"))
        draws = torch.stack([module.weight.detach() for _ in range(400)]) - source.state_dict()[site]
        width = kernel_prior.block_at(site, draws.shape[1:]).scale_tril.square().sum(-1).mean().sqrt()
        expected = scales.scale(fitted.blocks[site]).item() * float(width)
        assert float(draws.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


def test_in_the_frozen_null_kernels_alone_stay(folder):
    config, fitted = built(folder)
    frozen = _nulls(config, CARD, CPU, 0, fitted)["frozen"]
    sites = kernel_sites(frozen.network)
    assert sites.keys() == fitted.blocks.keys() and frozen.l2_sp == fitted.l2_sp
    for name, parameter in frozen.network.named_parameters():
        assert parameter.requires_grad == (name not in sites), name
    assert _nulls(*built_log_uniform(folder)).keys() == {"frozen"}


def built_log_uniform(folder: Path) -> tuple:
    config, program = built(folder, prior="log-uniform")
    return config, CARD, CPU, 0, program


@pytest.mark.parametrize(
    ("settings", "precision"),
    [({}, 100.0), ({"init": "random"}, 1.0), ({"centre": "none"}, 1.0), ({"centre": "none", "init": "source"}, 100.0)],
)
def test_weights_that_are_no_sites_are_held_near_a_source_network_alone(folder, settings, precision):
    assert built(folder, **settings)[1].l2_sp == precision


@pytest.mark.parametrize("scale", [None, 0.1])
def test_a_start_at_random_is_as_large_as_a_normal_prior(folder, scale):
    _, program = built(folder, prior="normal", prior_scale=scale)
    for mean in program.guide.means().values():
        assert float(mean.square().mean().sqrt()) == pytest.approx(scale or 1.0, rel=1e-5)


def test_a_start_at_random_under_a_centered_prior_keeps_its_size(folder):
    _, program = built(folder, prior="normal", centre="source", init="random")
    assert all(float(mean.square().mean().sqrt()) < 0.5 for mean in program.guide.means().values())


@pytest.mark.parametrize("estimator", ["shared", "local"])
def test_the_unit_of_a_site_is_that_of_its_prior(folder, estimator):
    _, program = built(folder, estimator=estimator, init_scale=0.05)
    prior = program.prior_modules["kernel_prior"]
    for site, mean in program.guide.means().items():
        root = prior.block_at(site, mean.shape).scale_tril
        unit = program.guide.unit(site)
        assert_close(unit, root if estimator == "shared" else root.square().sum(-1).sqrt())
        covariance = 0.0025 * root @ root.T
        deviation = program.guide.posterior(site)[1].detach().flatten(2)
        assert_close(deviation, covariance.diagonal().sqrt().expand_as(deviation))


def test_a_posterior_starts_no_wider_than_its_prior(folder):
    for settings, width in (({}, 0.1), ({"prior_scale": 0.2}, 0.2), ({"prior": "normal"}, 0.3)):
        _, program = built(folder, init_scale=0.3, **settings)
        assert_close(program.guide.scale(program.guide.sites[0]).max().item(), width)
