"""`MeanFieldNormal` against Normal distributions of its parameters."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from scipy import stats
from torch.testing import assert_close

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from tests.conftest import random_density

SHAPES = {"b.conv.weight": (3, 2, 3, 3), "a.weight": (2, 1, 3), "c": (4,)}
SITES = {site: torch.linspace(-1, 2, math.prod(shape)).reshape(shape) for site, shape in SHAPES.items()}


@pytest.fixture
def guide() -> MeanFieldNormal:
    return MeanFieldNormal(SITES, scale=0.2)


def test_sites_are_sampled_in_order_by_name(guide):
    """Names keep their dots; one Normal per site, no auxiliary sites."""
    trace = poutine.trace(guide).get_trace("any", argument=1)
    assert list(guide.sites) == list(SITES)
    assert trace.stochastic_nodes == list(SITES)
    for site, loc in SITES.items():
        fn = trace.nodes[site]["fn"]
        assert fn.event_shape == loc.shape
        assert_close(fn.mean, loc)
        assert_close(fn.stddev, torch.full_like(loc, 0.2))
        assert trace.nodes["_RETURN"]["value"][site] is trace.nodes[site]["value"]


def test_posterior_and_means_are_the_parameters(guide):
    """The posterior is differentiable; the means are a copy that training does not change."""
    loc, scale = guide.posterior("a.weight")
    assert_close(loc, SITES["a.weight"])
    assert_close(scale, torch.full_like(loc, 0.2))
    (loc.sum() + scale.sum()).backward()
    assert guide.shifts["a/weight"].grad is not None
    assert guide.log_scales["a/weight"].grad is not None
    means = guide.means()
    with torch.no_grad():
        guide.shifts["a/weight"].add_(1)
    assert_close(means, SITES)
    assert_close(guide.means()["a.weight"], SITES["a.weight"] + 1)


def test_it_copies_the_initial_means():
    first = {"w": torch.zeros(3)}
    guide = MeanFieldNormal(first)
    first["w"] += 1
    assert_close(guide.means()["w"], torch.zeros(3))


@pytest.mark.parametrize("unit", ["number", "diagonal", "root"])
def test_a_unit_is_a_change_of_coordinates(unit):
    """w = m₀ + A (μ + s ∘ ε): mean, standard deviation and samples against the formula."""
    root = random_density("gaussian", (2, 2)).scale_tril
    matrix = {"number": 0.3 * torch.eye(4).double(), "diagonal": root.diagonal().diag(), "root": root}[unit]
    start = torch.randn(3, 2, 2, 2, dtype=torch.double)
    given = {"number": torch.tensor(0.3).double(), "diagonal": root.diagonal(), "root": root}[unit]
    guide = MeanFieldNormal({"a.weight": start}, 0.1, {"a.weight": given})
    with torch.no_grad():
        guide.shifts["a/weight"].normal_()
        guide.log_scales["a/weight"].normal_()
    shift, scale = guide.shifts["a/weight"].detach().flatten(2), guide.scale("a.weight").detach().flatten(2)
    mean, deviation = guide.posterior("a.weight")
    assert_close(mean.flatten(2), start.flatten(2) + shift @ matrix.T)
    covariance = matrix @ scale.square().diag_embed() @ matrix.T
    assert_close(deviation.flatten(2).square(), covariance.diagonal(dim1=-2, dim2=-1))
    torch.manual_seed(3)
    drawn = guide.draw()["a.weight"]
    torch.manual_seed(3)
    noise = torch.randn(3, 2, 4, dtype=torch.double)
    assert_close(drawn.flatten(2), start.flatten(2) + (shift + scale * noise) @ matrix.T)
    assert_close(guide.distribution("a.weight").mean, mean)


@pytest.mark.parametrize("unit", ["number", "diagonal", "root"])
def test_whiten_is_the_inverse_of_the_unit(unit):
    root = random_density("gaussian", (2, 2)).scale_tril
    units = {"number": torch.tensor(0.3).double(), "diagonal": root.diagonal(), "root": root}
    guide = MeanFieldNormal({"a.weight": torch.randn(3, 2, 2, 2, dtype=torch.double)}, units={"a.weight": units[unit]})
    shift = torch.randn(3, 2, 2, 2, dtype=torch.double)
    guide.set_shift("a.weight", shift)
    assert_close(guide.whiten("a.weight", guide.means()["a.weight"]), shift)


def test_set_scale(guide):
    scale = torch.linspace(0.1, 0.6, 6).reshape(2, 1, 3)
    guide.set_scale("a.weight", scale)
    assert_close(guide.posterior("a.weight")[1], scale)
    assert_close(guide.posterior("c")[1], torch.full((4,), 0.2))


@pytest.mark.parametrize("way", ["draw", "forward"])
def test_samples_are_the_normals_of_the_posterior(way):
    """Kolmogorov–Smirnov of 20,000 weights; independent between calls and sites."""
    locs = {"a": torch.full((20_000,), 1.5), "b": torch.full((20_000,), -1.0)}
    guide = MeanFieldNormal(locs, scale=0.3)
    guide.set_scale("b", torch.full((20_000,), 2.0))
    sample = guide.draw if way == "draw" else guide
    drawn = sample()
    for site, (loc, scale) in {"a": (1.5, 0.3), "b": (-1.0, 2.0)}.items():
        assert stats.kstest(drawn[site].detach().numpy(), stats.norm(loc, scale).cdf).pvalue > 1e-3
        assert drawn[site].requires_grad == (way == "forward")
    assert abs(torch.stack([drawn["a"], drawn["b"]]).corrcoef()[0, 1]) < 4 / 20_000**0.5
    assert (sample()["a"] != drawn["a"]).all()


def test_a_draw_has_no_pyro_effect(guide):
    assert len(poutine.trace(guide.draw).get_trace().stochastic_nodes) == 0


@pytest.mark.parametrize("prior", ["normal", "log-uniform", "dwp"])
def test_every_parameter_receives_a_gradient_and_moves(scene, prior):
    tiny = scene(prior)
    loss = MeanFieldELBO().loss_and_grads(tiny.model, tiny.guide, *tiny.data)
    assert torch.tensor(loss).isfinite()
    assert len(list(tiny.guide.parameters())) == 4
    assert all((p.grad != 0).all() and p.grad.isfinite().all() for p in tiny.guide.parameters())

    before = [p.detach().clone() for p in tiny.guide.parameters()]
    SVI(tiny.model, tiny.guide, Adam({"lr": 1e-3}), MeanFieldELBO()).step(*tiny.data)
    assert all((p != old).all() for p, old in zip(tiny.guide.parameters(), before, strict=True))


def test_state_dict_round_trip(guide):
    """Another guide of the same sites receives this one's state."""
    guide.set_scale("c", torch.tensor([0.1, 0.2, 0.3, 0.4]))
    other = MeanFieldNormal({site: torch.zeros_like(loc) for site, loc in SITES.items()})
    other.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(1)
    drawn = guide.draw()
    pyro.set_rng_seed(1)
    assert_close(other.draw(), drawn, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0, -0.1, float("nan")])
def test_a_scale_that_is_not_positive_raises(scale):
    with pytest.raises(ValueError, match="must be positive"):
        MeanFieldNormal(SITES, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [-2000.0, 2000.0])
def test_an_extreme_scale_is_limited_and_keeps_its_gradient(far, dtype):
    """exp(−2000) is 0 and exp(2000) infinite."""
    guide = MeanFieldNormal({"w": torch.zeros(3, dtype=dtype)})
    log_scale = guide.log_scales["w"]
    with torch.no_grad():
        log_scale.fill_(far)
    _, scale = guide.posterior("w")
    assert (scale > 0).all() and scale.square().isfinite().all()
    trace = poutine.trace(guide).get_trace()
    fn = trace.nodes["w"]["fn"].base_dist
    assert (fn.scale > 0).all() and fn.scale.square().isfinite().all()
    (slope,) = torch.autograd.grad(fn.entropy().sum(), log_scale)
    assert_close(slope, torch.ones(3, dtype=dtype))
