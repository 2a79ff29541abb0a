"""The setups of `svi`: initial kernels and other weights, their priors, and the null models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributions import kl_divergence
from torch.testing import assert_close

from dwp_pyro.config.training import SviConfig
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.priors.blocks import kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.runtime.errors import ConfigError
from dwp_pyro.training.network_training import TrainingSetup
from dwp_pyro.training.svi import _make_nulls, _make_setup, gaussian_prior
from tests.conftest import random_density

NETWORK = NetworkConfig(("flair",), ("lesion",), ((1,),), "openms", None, (16, 16, 16), widths=(2, 2, 3, 3))
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a Gaussian prior and two source networks."""
    blocks = prior_blocks(NETWORK.build())
    names = dict.fromkeys(blocks.values())
    block_infos = {name: BlockInfo(tuple(site for site, block in blocks.items() if block == name), 9) for name in names}
    KernelPrior("gaussian", {name: random_density("gaussian").float() for name in names}, block_infos).save(tmp_path)
    Posterior(NETWORK, [Member(NETWORK.build(), None) for _ in range(2)]).save(tmp_path / "source.safetensors")
    return tmp_path


def build(folder: Path, member: int = 0, **settings: object) -> tuple[SviConfig, TrainingSetup]:
    config = SviConfig(prior_dir=str(folder), **{"prior": "gaussian", **settings}).resolve()
    return config, _make_setup(config, NETWORK, CPU, member)


def test_the_prior_null_has_the_scales_of_the_fitted_setup_and_their_hyperprior(folder):
    """The scales are fixed: log p(c) is that of the posterior's ELBO, and draws are as wide as its prior."""
    config, fitted = build(folder, 1)
    scales = fitted.prior_modules["scales"]
    with torch.no_grad():
        scales.log_scales[scales.blocks.index("up1")].add_(0.4)
    null = _make_nulls(config, NETWORK, CPU, 1, fitted)["prior"]
    assert null.guide is None and not any(p.requires_grad for p in null.prior_modules["scales"].parameters())
    assert_close(null.prior_modules["scales"].log_prob(), scales.log_prob().detach())
    assert scales.log_prob().item() < -1
    source = Posterior.load(folder / "source.safetensors").members[1].network
    kernel_prior = null.prior_modules["kernel_prior"]
    for site in ("up1.conv1.weight", "up2.conv1.weight"):
        module = null.network.get_submodule(site.removesuffix(".weight"))
        draws = torch.stack([module.weight.detach() for _ in range(400)]) - source.state_dict()[site]
        width = kernel_prior.block_at(site, draws.shape[1:]).scale_tril.square().sum(-1).mean().sqrt()
        expected = scales.scale(fitted.blocks[site]).item() * float(width)
        assert float(draws.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("settings", [{}, {"prior": "normal"}, {"init": "random"}, {"center": "none", "init": "prior"}])
def test_null_models_start_with_the_weights_of_the_posterior(folder, settings):
    """Those that are not kernels: their ELBOs compare from the same start only."""
    torch.manual_seed(0)
    config, fitted = build(folder, **settings)
    starts = {
        name: value.detach().clone() for name, value in fitted.network.named_parameters() if name not in fitted.blocks
    }
    torch.manual_seed(0)
    for null in _make_nulls(config, NETWORK, CPU, 0, fitted).values():
        found = dict(null.network.named_parameters())
        for name, value in starts.items():
            assert_close(found[name].detach(), value, msg=name)


def test_in_the_frozen_null_only_kernels_are_fixed(folder):
    config, fitted = build(folder)
    frozen = _make_nulls(config, NETWORK, CPU, 0, fitted)["frozen"]
    sites = kernel_sites(frozen.network)
    assert sites.keys() == fitted.blocks.keys() and frozen.l2_sp == fitted.l2_sp
    for name, parameter in frozen.network.named_parameters():
        assert parameter.requires_grad == (name not in sites), name
    config, fitted = build(folder, prior="log-uniform")
    assert _make_nulls(config, NETWORK, CPU, 0, fitted) == {}  # its ELBO is known up to a constant


@pytest.mark.parametrize(
    ("settings", "precision"),
    [({}, 100.0), ({"init": "random"}, 1.0), ({"center": "none"}, 1.0), ({"center": "none", "init": "source"}, 100.0)],
)
def test_weights_without_a_site_are_kept_near_a_source_network(folder, settings, precision):
    assert build(folder, **settings)[1].l2_sp == precision


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("prior", ["normal", "he"])
def test_a_random_start_is_as_large_as_its_prior(folder, prior, scale):
    _, setup = build(folder, prior=prior, prior_scale=scale)
    for site, mean in setup.guide.means().items():
        spread = setup.priors[site]().base_dist.scale
        assert float(mean.square().mean().sqrt()) == pytest.approx(float(spread.flatten()[0]), rel=1e-5)
        by_hand = (scale or 1.0) * (1.0 if prior == "normal" else (2 / (27 * mean.shape[1])) ** 0.5)
        assert_close(spread, torch.full_like(mean, by_hand))


def test_a_random_start_under_a_centered_prior_keeps_its_size(folder):
    _, setup = build(folder, prior="normal", center="source", init="random")
    assert all(float(mean.square().mean().sqrt()) < 0.5 for mean in setup.guide.means().values())


@pytest.mark.parametrize("estimator", ["weight-sample", "local"])
def test_the_unit_of_a_site_is_that_of_its_prior(folder, estimator):
    _, setup = build(folder, estimator=estimator, init_scale=0.05)
    prior = setup.prior_modules["kernel_prior"]
    for site, mean in setup.guide.means().items():
        root = prior.block_at(site, mean.shape).scale_tril
        unit = setup.guide.unit(site)
        assert_close(unit, root if estimator == "weight-sample" else root.square().sum(-1).sqrt())
        covariance = 0.0025 * root @ root.T
        deviation = setup.guide.posterior(site)[1].detach().flatten(2)
        assert_close(deviation, covariance.diagonal().sqrt().expand_as(deviation))


def test_a_posterior_starts_no_wider_than_its_prior(folder):
    for settings, width in (({}, 0.1), ({"prior_scale": 0.2}, 0.2), ({"prior": "normal"}, 0.3)):
        _, setup = build(folder, init_scale=0.3, **settings)
        assert_close(setup.guide.scale(setup.guide.sites[0]).max().item(), width)


@pytest.mark.parametrize("prior", ["gaussian", "isotropic"])
def test_the_gaussian_prior_is_the_prior_of_the_run(folder, prior):
    config, setup = build(folder, prior=prior, prior_scale=0.2, estimator="local")
    start = gaussian_prior(config, NETWORK)
    network, guide = start.members[0]
    assert guide.sites == tuple(setup.priors)
    for site in guide.sites:
        divergence = kl_divergence(guide.distribution(site), setup.priors[site]())
        assert divergence.item() == pytest.approx(0, abs=1e-3)
    source = Posterior.load(folder / "source.safetensors").members[0].network
    assert_close(network.state_dict(), source.state_dict())
    assert_close(start.means(), source.state_dict())


@pytest.mark.parametrize(
    "settings", [{"prior_scale": None}, {"center": "none"}, {"init": "random"}, {"prior": "mixture"}, {"prior": "he"}]
)
def test_another_prior_is_no_gaussian_prior_of_sites(folder, settings):
    config = SviConfig(prior_dir=str(folder), **{"prior": "gaussian", "prior_scale": 0.2, **settings})
    with pytest.raises(ConfigError, match="fixed prior-scale"):
        gaussian_prior(config, NETWORK)
