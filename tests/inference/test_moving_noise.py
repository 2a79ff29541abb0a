"""The handler: whose noise it answers, that it is standard normal at every step, and goes on from any."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference import moving_noise as module
from dwp_pyro.inference.moving_noise import MovingNoise

SHAPES = {"a": (7, 11, 3), "b": (4,), "c": (40, 13)}
WEIGHTS = 7 * 11 * 3 + 4 + 40 * 13
RENEWED = 95  # an eighth of them, rounded up


def guide(dtype: torch.dtype = torch.float64) -> MeanFieldNormal:
    """Its weights are the noise; in double precision no two numbers coincide."""
    return MeanFieldNormal({site: torch.zeros(shape, dtype=dtype) for site, shape in SHAPES.items()}, scale=1.0)


def noise_of(steps: int, handler: MovingNoise, dtype: torch.dtype = torch.float64) -> Tensor:
    """[steps, WEIGHTS]."""
    q = guide(dtype)
    found = []
    for _ in range(steps):
        with handler:
            weights = q()
        assert {site: tuple(value.shape) for site, value in weights.items()} == SHAPES
        found.append(torch.cat([value.detach().flatten() for value in weights.values()]))
    return torch.stack(found)


@pytest.fixture
def moving(monkeypatch) -> None:
    monkeypatch.setattr(module, "_FEWEST", 1)


@pytest.mark.usefixtures("moving")
def test_an_eighth_of_the_noise_is_new_and_the_rest_moves_on():
    noise = noise_of(40, MovingNoise(3))
    assert torch.equal(noise[1:, :-RENEWED], noise[:-1, RENEWED:])
    assert noise.unique().numel() == WEIGHTS + 39 * RENEWED
    assert all(weight.unique().numel() == 40 for weight in noise.T)  # never the same number twice


@pytest.mark.usefixtures("moving")
def test_the_noise_of_a_step_is_standard_normal_and_independent():
    """Of one step, over seeds, since that of several is not independent."""
    noise = torch.cat([noise_of(12, MovingNoise(seed))[-1:] for seed in range(300)])
    assert stats.kstest(noise.flatten(), "norm").pvalue > 0.01
    covariance = noise.T @ noise / 300
    errors = (
        covariance - torch.eye(WEIGHTS, dtype=torch.float64)
    ) * 300**0.5  # each of unit variance, of the diagonal 2
    assert abs(float(errors.square().mean()) - 1) < 0.02
    assert float(errors.abs().max()) < 8


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1, 5, 9, 30])
def test_it_goes_on_from_any_step(dtype, step):
    whole = noise_of(33, MovingNoise(7), dtype)
    assert whole.dtype == dtype
    torch.manual_seed(step)
    assert torch.equal(noise_of(3, MovingNoise(7, step), dtype), whole[step : step + 3])


def test_few_weights_have_all_their_noise_drawn_at_each_step():
    noise = noise_of(20, MovingNoise(1))
    assert noise.unique().numel() == noise.numel()
    assert torch.equal(noise_of(2, MovingNoise(1, 4)), noise[4:6])
    assert stats.kstest(noise.flatten(), "norm").pvalue > 0.01


@pytest.mark.usefixtures("moving")
def test_the_seed_alone_says_what_is_drawn():
    first, second = noise_of(3, MovingNoise(1)), noise_of(3, MovingNoise(2))
    assert torch.isin(first, second).sum() == 0
    state = torch.get_rng_state()
    assert torch.equal(noise_of(3, MovingNoise(1)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isin(torch.cat([each.flatten() for each in guide()().values()]), first).sum() == 0  # left alone


@pytest.mark.usefixtures("moving")
def test_a_draw_can_be_differentiated_after_many_others():
    """As several particles are: what a draw needs is its own."""
    handler, q = MovingNoise(0), guide(torch.float64)
    with handler:
        draws = [q()["c"] for _ in range(30)]
    for draw in draws:
        (slope,) = torch.autograd.grad(draw.square().sum(), q.log_scales["c"])
        assert_close(slope, 2 * draw.detach().square())


@pytest.mark.parametrize("other", [torch.zeros(3, dtype=torch.float64), torch.zeros(755)])
def test_other_weights_are_refused(other):
    handler = MovingNoise(0)
    with handler:
        guide()()
        with pytest.raises(ValueError, match="noise of 755 weights"):
            MeanFieldNormal({"a": other})()
