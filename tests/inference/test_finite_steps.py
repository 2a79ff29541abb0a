"""Which steps of an optimiser are taken, and what the others leave untouched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dwp_pyro.inference.finite_steps import MOST_IN_A_ROW, FiniteSteps


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(5))]


def steps_of(parameters: list[nn.Parameter]) -> FiniteSteps:
    return FiniteSteps(torch.optim.AdamW(parameters, lr=0.1, fused=True))


def set_gradients(parameters: list[nn.Parameter], last: float = 1.0) -> None:
    """Of the first two; the third has none, like a parameter that a step did not use. `last` is the last number."""
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    parameters[1].grad[-1, -1] = last


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [
        (math.nan, 1.0),
        (math.inf, 1.0),
        (-math.inf, 1.0),
        (2.0, math.nan),
        (2.0, math.inf),
        (2.0, -math.inf),
        (2.0, 1e25),
    ],
)
def test_a_step_that_is_no_number_is_left_out(parameters, loss, gradient):
    """Nor one whose gradient's square is none: Adam's second moment would be infinite from then on."""
    take_step = steps_of(parameters)
    set_gradients(parameters)
    take_step(torch.tensor(1.0))
    state = [x.clone() for p in parameters[:2] for x in (p, *take_step.optimizer.state[p].values())]
    set_gradients(parameters, gradient)
    take_step(torch.tensor(loss))
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            state, [x for p in parameters[:2] for x in (p, *take_step.optimizer.state[p].values())], strict=True
        )
    )
    assert (take_step.skipped, take_step.in_a_row) == (1, 1)
    assert all(p.grad is None for p in parameters)
    set_gradients(parameters)
    take_step(torch.tensor(1.0))
    assert (take_step.skipped, take_step.in_a_row) == (1, 0)
    assert not torch.equal(parameters[0], state[0])


def test_the_square_of_a_gradient_of_one_number_counts_too():
    (parameter,) = parameters = [nn.Parameter(torch.ones(1))]
    take_step = steps_of(parameters)
    parameter.grad = torch.tensor([1e25])
    take_step(torch.tensor(1.0))
    assert take_step.skipped == 1 and parameter == 1


def test_a_step_is_that_of_the_optimiser_alone(parameters):
    take_step = steps_of(parameters)
    plain = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = torch.optim.AdamW(plain, lr=0.1, fused=True)
    for last in (1.0, -1e15):
        for each in (parameters, plain):
            set_gradients(each, last)
        take_step(torch.tensor(-3.0))
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(parameters, plain, strict=True))
    assert take_step.skipped == 0


def test_it_is_stuck_after_so_many_in_a_row_and_counts_on(parameters):
    take_step = steps_of(parameters)
    for loss in [math.nan] * (MOST_IN_A_ROW - 1) + [0.0] + [math.nan] * (MOST_IN_A_ROW - 1):
        set_gradients(parameters)
        take_step(torch.tensor(loss))
        assert not take_step.stuck
    other = steps_of(parameters)
    other.count_on_from(take_step.counts())
    set_gradients(parameters)
    other(torch.tensor(math.nan))
    assert other.stuck and other.skipped == 2 * MOST_IN_A_ROW - 1
    other.count_on_from({})
    assert not other.stuck and other.skipped == 0
