"""`PriorScales`: the learned scales of priors, kept from 0 and infinity by a hyperprior."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from dwp_pyro.priors.prior_scales import PriorScales


def test_the_mode_is_the_initial_scale_and_both_limits_are_penalized():
    scales = PriorScales({"up1": 100, "up2": 7}, start=0.2)
    assert_close(scales.scale("up1"), torch.tensor(0.2))
    assert_close(scales.log_prob(), torch.tensor(0.0))
    with torch.no_grad():
        for change in (-3.0, -0.1, 0.1, 3.0):
            scales.log_scales[0].fill_(math.log(0.2) + change)
            expected = -100 * (change + 0.5 * (math.exp(-2 * change) - 1))
            assert_close(scales.log_prob(), torch.tensor(expected), rtol=1e-5, atol=1e-5)
            assert scales.log_prob() < 0


def test_it_is_an_inverse_gamma_in_the_square():
    """Differences of the log-density of log c against PyTorch's inverse gamma of c² with its Jacobian 2c²."""
    scales = PriorScales({"all": 12}, start=0.3)
    nu = 12
    gamma = torch.distributions.InverseGamma(torch.tensor(nu / 2), torch.tensor(nu / 2 * 0.09))
    found, expected = [], []
    for c in (0.1, 0.25, 0.3, 0.8):
        with torch.no_grad():
            scales.log_scales.fill_(math.log(c))
        found.append(scales.log_prob())
        expected.append(gamma.log_prob(torch.tensor(c**2)) + math.log(2 * c**2))
    found, expected = torch.stack(found), torch.stack(expected)
    assert_close(found - found[2], expected - expected[2], rtol=1e-4, atol=1e-4)


def test_the_optimal_scale_under_a_gaussian_has_a_closed_form():
    """c² = (Σ (σ² + μ²) + n c₀²) / 2n, by gradient."""
    squares, n, start = 3.7, 40, 0.2
    scales = PriorScales({"all": n}, start)
    optimizer = torch.optim.LBFGS(scales.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        c = scales.scale("all")
        value = 0.5 * squares / c**2 + n * c.log() - scales.log_prob()
        value.backward()
        return value

    optimizer.step(loss)
    assert_close(scales.scale("all").item() ** 2, (squares + n * start**2) / (2 * n), rtol=1e-3, atol=0)
