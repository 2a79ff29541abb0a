"""Which steps of an optimizer are taken, and that skipped steps change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dwp_pyro.runtime.non_finite_guard import MAX_IN_A_ROW, NonFiniteGuard


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(5))]


def guard_of(parameters: list[nn.Parameter]) -> NonFiniteGuard:
    return NonFiniteGuard(torch.optim.AdamW(parameters, lr=0.1, fused=True))


def set_gradients(parameters: list[nn.Parameter], last: float = 1.0) -> None:
    """Set the gradients of the first two; the third has none, like an unused parameter. `last` is the last element."""
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
def test_a_step_that_is_not_finite_is_skipped(parameters, loss, gradient):
    """Also if the gradient's square is infinite: Adam's second moment would stay infinite."""
    guard = guard_of(parameters)
    set_gradients(parameters)
    guard(torch.tensor(1.0))
    state = [x.clone() for p in parameters[:2] for x in (p, *guard.optimizer.state[p].values())]
    set_gradients(parameters, gradient)
    guard(torch.tensor(loss))
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            state, [x for p in parameters[:2] for x in (p, *guard.optimizer.state[p].values())], strict=True
        )
    )
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    assert all(p.grad is None for p in parameters)
    set_gradients(parameters)
    guard(torch.tensor(1.0))
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert not torch.equal(parameters[0], state[0])


def test_the_square_of_a_single_gradient_must_be_finite():
    (parameter,) = parameters = [nn.Parameter(torch.ones(1))]
    guard = guard_of(parameters)
    parameter.grad = torch.tensor([1e25])
    guard(torch.tensor(1.0))
    assert guard.skipped == 1 and parameter == 1


def test_a_step_equals_that_of_the_optimizer(parameters):
    guard = guard_of(parameters)
    plain = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = torch.optim.AdamW(plain, lr=0.1, fused=True)
    for last in (1.0, -1e15):
        for each in (parameters, plain):
            set_gradients(each, last)
        guard(torch.tensor(-3.0))
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(parameters, plain, strict=True))
    assert guard.skipped == 0


def test_it_diverges_after_ten_skipped_steps_in_a_row_and_restores_its_counts(parameters):
    guard = guard_of(parameters)
    for loss in [math.nan] * (MAX_IN_A_ROW - 1) + [0.0] + [math.nan] * (MAX_IN_A_ROW - 1):
        set_gradients(parameters)
        guard(torch.tensor(loss))
        assert not guard.diverged
    other = guard_of(parameters)
    other.load_state_dict(guard.state_dict())
    set_gradients(parameters)
    other(torch.tensor(math.nan))
    assert other.diverged and other.skipped == 2 * MAX_IN_A_ROW - 1
    other.load_state_dict({})
    assert not other.diverged and other.skipped == 0
