"""`LogScaleNormal`: a Normal like any other."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import Normal
from torch.distributions import kl_divergence
from torch.testing import assert_close

from dwp_pyro.distributions.log_scale_normal import LogScaleNormal, log_scale_normals


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def test_density_moments_and_entropy_are_those_of_a_normal(parameters):
    loc, log_scale = parameters
    ours, stock = LogScaleNormal(loc, log_scale), Normal(loc, log_scale.exp())
    value = torch.randn(5, 4, 3, dtype=torch.float64)
    assert_close(ours.log_prob(value), stock.log_prob(value))
    assert_close(ours.entropy(), stock.entropy())
    assert_close(ours.mean, stock.mean)
    assert_close(ours.stddev, stock.stddev)
    assert_close(ours.expand([2, 4, 3]).entropy(), stock.expand([2, 4, 3]).entropy())


@pytest.mark.parametrize("sample_shape", [(), (2,)])
def test_a_draw_and_its_gradient_are_those_of_a_normal(parameters, sample_shape):
    gradients = []
    for kind in (lambda loc, log_scale: LogScaleNormal(loc, log_scale), lambda m, r: Normal(m, r.exp())):
        torch.manual_seed(3)
        draw = kind(*parameters).rsample(sample_shape)
        gradients.append([draw, *torch.autograd.grad((draw * draw.detach().cos()).sum(), parameters)])
    assert_close(*gradients)


USES = {
    "the draw": lambda q, draw: draw.sin().sum(),
    "the draw and the entropy": lambda q, draw: draw.sin().sum() + q.entropy().sum(),
    "the draw and its density": lambda q, draw: q.log_prob(draw).sum(),
    "the draw and the divergence": lambda q, draw: draw.sin().sum() + kl_divergence(q, Normal(0.2, 0.7)).sum(),
    "the entropy": lambda q, draw: q.entropy().square().sum(),
    "the deviation": lambda q, draw: q.stddev.sin().sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients_of_a_draw_with_given_noise_and_of_all_else_meet(parameters, use):
    """They are those of m + s ε."""
    loc, log_scale = parameters
    noise = torch.randn_like(loc)
    ours, stock = log_scale_normals([loc], [log_scale], [noise])[0], Normal(loc, log_scale.exp())
    found, expected = use(ours, ours.rsample()), use(stock, stock.loc + stock.scale * noise)
    assert_close(found, expected)
    pairs = [torch.autograd.grad(each, parameters, allow_unused=True) for each in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        assert_close(*(torch.zeros_like(loc) if each is None else each for each in (one, other)))


def test_draws_of_several_sites_are_one_node_and_each_has_its_own_gradient():
    """Three sites of other shapes: of one the draw is used, of one the entropy, of one both."""
    torch.manual_seed(0)
    shapes = [(4, 3), (2,), (3, 1, 2)]
    parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (*shapes, *shapes)]
    locs, log_scales = parameters[:3], parameters[3:]
    noise = [torch.randn_like(loc) for loc in locs]
    ours = log_scale_normals(locs, log_scales, noise)
    assert len({q.rsample().grad_fn for q in log_scale_normals(locs, log_scales, noise)}) == 1
    found = ours[0].rsample().sin().sum() + ours[1].entropy().square().sum()
    found = found + ours[2].rsample().cos().sum() + ours[2].entropy().sin().sum()
    stock = [Normal(loc, log_scale.exp()) for loc, log_scale in zip(locs, log_scales, strict=True)]
    draws = [q.loc + q.scale * one for q, one in zip(stock, noise, strict=True)]
    expected = draws[0].sin().sum() + stock[1].entropy().square().sum()
    expected = expected + draws[2].cos().sum() + stock[2].entropy().sin().sum()
    assert_close(found, expected)
    pairs = [torch.autograd.grad(each, parameters, allow_unused=True) for each in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        if one is not None:
            assert_close(one, other)
    assert [one is None for one in pairs[0]] == [one is None for one in pairs[1]]


def test_noise_that_is_given_is_that_of_the_first_draw(parameters):
    loc, log_scale = parameters
    noise = torch.randn_like(loc)
    (ours,) = log_scale_normals([loc], [log_scale], [noise])
    assert_close(ours.rsample(), loc + log_scale.exp() * noise)
    torch.manual_seed(0)
    second = ours.rsample()
    torch.manual_seed(0)
    assert_close(second, LogScaleNormal(loc, log_scale).rsample())
