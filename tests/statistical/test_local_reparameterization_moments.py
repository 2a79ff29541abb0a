"""Local reparameterization against one shared weight sample: which moments agree and which differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.likelihoods import LIKELIHOODS
from dwp_pyro.priors.make_prior import make_prior

DRAWS = 10_000
SIDE = 4


@dataclass(frozen=True)
class Draws:
    """Logits [DRAWS, 2, 4, 4, 4] of one convolution with a bias, by both estimators, and a label."""

    shared: Tensor
    local: Tensor
    label: Tensor

    def log_likelihoods(self, logits: Tensor, name: str) -> Tensor:
        brain_mask = torch.ones_like(self.label)
        weight = {"dice_weight": 1.0} if name == "dice-ce" else {}  # the cross-entropy is voxelwise
        return LIKELIHOODS[name](logits, self.label, brain_mask, **weight)


@pytest.fixture(scope="module")
def draws() -> Draws:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1)).double()
    weight = network[0].weight
    locs = bayesianize(network, {"0.weight": make_prior("normal", "0.weight", weight)})
    guide = MeanFieldNormal(locs, scale=0.15)
    image = 1 + 0.5 * torch.randn(1, 1, SIDE, SIDE, SIDE, dtype=torch.double)
    with torch.no_grad():
        for log_scale in guide.log_scales.values():
            log_scale += 0.5 * torch.randn_like(log_scale)
        # The kernels of all draws at once, as channels of one convolution.
        kernels = torch.cat([guide.draw()["0.weight"] for _ in range(DRAWS)])
        shared = F.conv3d(image, kernels, padding=1).reshape(DRAWS, 2, SIDE, SIDE, SIDE)
        shared = shared + network[0].bias[:, None, None, None]
        with LocalReparameterization(guide.posterior):
            local = network(image.expand(DRAWS, -1, -1, -1, -1))
    # The prediction of the mean kernel, so that noise in the weights lowers the likelihood.
    label = local.mean(0).argmax(0).expand(DRAWS, 1, -1, -1, -1)
    return Draws(shared, local, label)


def z_score(a: Tensor, b: Tensor) -> Tensor:
    """Return the difference of two means over the first axis, in combined standard errors."""
    return (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()


def test_every_activation_keeps_its_mean_and_variance(draws):
    """Means and variances of 128 activations agree; the standard error of a normal's sample variance is σ²√(2/n)."""
    assert z_score(draws.shared, draws.local).abs().max() < 4.5
    shared, local = draws.shared.var(0), draws.local.var(0)
    error = (shared.square() + local.square()).sqrt() * math.sqrt(2 / DRAWS)
    assert ((shared - local).abs() < 4.5 * error).all()


def test_one_convolution_with_a_voxelwise_likelihood_has_the_same_expected_loss(draws):
    """A sum over voxels depends on the marginal distribution of each voxel only."""
    shared, local = (draws.log_likelihoods(x, "categorical") for x in (draws.shared, draws.local))
    assert abs(z_score(shared, local)) < 4


def test_only_a_shared_kernel_correlates_voxels(draws):
    """Two neighbors with nearly the same input are correlated under one kernel, independent under local noise."""
    pair = [(0, 1, 1, 1), (0, 1, 1, 2)]
    shared, local = (torch.stack([x[:, *i] for i in pair]).corrcoef()[0, 1] for x in (draws.shared, draws.local))
    assert shared > 0.3
    assert abs(local) < 4 / math.sqrt(DRAWS)


@pytest.mark.parametrize("case", ["instance norm", "dice"])
def test_the_objective_differs_if_it_is_not_voxelwise(draws, case):
    """Functions of several voxels depend on their correlation: the expected losses differ by many standard errors."""
    name = "dice-ce" if case == "dice" else "categorical"
    logits = [F.instance_norm(x) if case == "instance norm" else x for x in (draws.shared, draws.local)]
    shared, local = (draws.log_likelihoods(x, name) for x in logits)
    assert abs(z_score(shared, local)) > 6
