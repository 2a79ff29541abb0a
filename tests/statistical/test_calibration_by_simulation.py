"""Simulation-based calibration of the whole inference (Talts et al. 2018).

Weights are drawn from the prior and data from the weights; the rank of a true weight among draws of the inferred
posterior is uniform if the posterior is exact.

The network is one 3×3×3 grouped convolution, whose output channels are the replicates. Observations are Gaussian, so
that the posterior N(m, Λ⁻¹) is known, as is the best q with independent coordinates v, w = A v: N(m, A D⁻¹ Aᵀ), D the
diagonal of AᵀΛA. The true standard deviation of weight i is κ_i ≥ 1 times that of q, which is its known overconfidence.
Inference uses the loop, the defaults and the units of `svi`.

$ pytest -s tests/statistical/test_calibration_by_simulation.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pyro
import pytest
import torch
from pyro.distributions import Normal
from scipy import stats
from torch import Tensor, nn

from dwp_pyro.config.training import SviConfig
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.loop import fit
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.training.svi import _make_setup, annealed
from dwp_pyro.training.target import Method
from tests.conftest import random_density

pytestmark = pytest.mark.slow

REPLICATES = 400
NOISE = 0.5
DRAWS = 199  # of the posterior: 200 ranks
LEVELS = (0.5, 0.8, 0.9, 0.95)
TOLERANCE = 0.02  # of a coverage
SITE = "0.weight"


class Regression(nn.Module):
    """p(y, W | image): a Bayesian convolution with Gaussian noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, observed: Tensor) -> None:
        output = self.network(image).flatten(2)
        pyro.sample("y", Normal(output, NOISE).to_event(3), obs=observed)


class Simulation:
    """One data set per replicate, simulated from a prior, with its exact and best factorized posterior.

    Args:
        prior: Prior over all kernels, [REPLICATES, 1, 3, 3, 3].
        image: Image of every replicate, [X, Y, Z].
        mean: Prior mean of a kernel, [27].
        covariance: Prior covariance of a kernel, [27, 27].
        unit: A, [27, 27].
    """

    def __init__(
        self, prior: pyro.distributions.TorchDistribution, image: Tensor, mean: Tensor, covariance: Tensor, unit: Tensor
    ) -> None:
        self.prior = prior
        self.unit = unit
        self.image = image.expand(1, REPLICATES, *image.shape)
        self.windows = _windows(image)
        self.weights = prior.sample()
        self.observed = self._observe(self.windows)
        prior_precision = covariance.inverse()
        self.precision = prior_precision + self.windows.T @ self.windows / NOISE**2
        self.mean = torch.linalg.solve(
            self.precision, (prior_precision @ mean)[:, None] + self.windows.T @ self.observed.T / NOISE**2
        ).T
        best = (unit.T @ self.precision @ unit).diagonal().reciprocal()
        self.best = unit @ best.diag() @ unit.T

    def _observe(self, windows: Tensor) -> Tensor:
        """Simulate observations, [REPLICATES, voxels]."""
        clean = self.weights.flatten(1) @ windows.T
        return clean + NOISE * torch.randn_like(clean)

    def infer(self, folder: Path, estimator: str = "weight-sample", beta: float = 1.0) -> MeanFieldNormal:
        """Fit a guide by the loop of `svi` with its defaults, from draws of the prior."""
        config = SviConfig(estimator=estimator)
        network = nn.Sequential(nn.Conv3d(REPLICATES, REPLICATES, 3, groups=REPLICATES, bias=False)).double()
        bayesianize(network, {SITE: self.prior})
        diagonal = self.unit.diagonal()
        unit = diagonal if torch.equal(self.unit, diagonal.diag()) else self.unit
        guide = MeanFieldNormal({SITE: self.prior.sample()}, config.init_scale, {SITE: unit})
        schedule = Method(
            command="svi",
            config=config,
            members=1,
            make_setup=_make_setup,
            beta=lambda fraction: beta * annealed(config, fraction),
            estimator=estimator,
        ).schedule(0, config.steps)
        data = [(self.image[0], self.observed)] * config.steps
        (folder / "c").unlink(missing_ok=True)
        fit(Regression(network), guide, data, 1, schedule, folder / "c", description="", log=lambda step, metrics: None)
        return guide

    def ranks(self, guide: MeanFieldNormal) -> Tensor:
        """Return the number of draws below the true weight, [REPLICATES, 27]."""
        return sum((guide.draw()[SITE] < self.weights).long() for _ in range(DRAWS)).flatten(1)

    def prediction_ranks(self, guide: MeanFieldNormal, image: Tensor) -> Tensor:
        """Return the ranks of observations in the windows of another image, [REPLICATES, windows]."""
        windows = _windows(image)
        truth = self._observe(windows)
        below = torch.zeros_like(truth, dtype=torch.long)
        for _ in range(DRAWS):
            clean = guide.draw()[SITE].flatten(1) @ windows.T
            below += clean + NOISE * torch.randn_like(clean) < truth
        return below

    def overconfidence(self) -> Tensor:
        """Return κ of each weight, [27]."""
        return (self.precision.inverse().diagonal() / self.best.diagonal()).sqrt()

    def prediction_overconfidence(self, image: Tensor) -> Tensor:
        """Return the same ratio for the predictions of `prediction_ranks`, [windows]."""
        windows = _windows(image)

        def variance(covariance: Tensor) -> Tensor:
            return ((windows @ covariance) * windows).sum(1) + NOISE**2

        return (variance(self.precision.inverse()) / variance(self.best)).sqrt()


def _windows(image: Tensor) -> Tensor:
    """Return the input window of each output voxel, image [X, Y, Z] → [voxels, 27]."""
    return image.unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3).flatten(0, 2)


def _impulse() -> Tensor:
    """Return an image where each output voxel depends on one weight, so that the posterior factorizes."""
    image = torch.zeros(5, 5, 5, dtype=torch.double)
    image[2, 2, 2] = 1.0
    return image


def _standard_normal() -> Simulation:
    prior = Normal(torch.zeros(REPLICATES, 1, 3, 3, 3).double(), 1.0).to_event(5)
    identity = torch.eye(27).double()
    return Simulation(prior, _impulse(), torch.zeros(27).double(), identity, identity)


def _uniformity(ranks: Tensor) -> float:
    """Return the p-value of a χ² test over 20 bins."""
    counts = torch.bincount(ranks.flatten() // 10, minlength=20)
    return float(stats.chisquare(counts.numpy()).pvalue)


def _coverage(ranks: Tensor, level: float) -> float:
    """Return the fraction of true values within the central interval of the draws."""
    return float(((ranks + 0.5) / (DRAWS + 1) - 0.5).abs().lt(level / 2).double().mean())


def _expected(level: float, overconfidence: Tensor | float) -> float:
    """Return the coverage if the true standard deviation is `overconfidence` times that of q."""
    reach = stats.norm.ppf(0.5 + level / 2) / torch.as_tensor(overconfidence)
    return float((2 * torch.special.ndtr(reach) - 1).mean())


def _check_coverage(what: str, ranks: Tensor, overconfidence: Tensor | float) -> None:
    """Print coverages and compare them with theory."""
    found: Mapping[float, float] = {level: _coverage(ranks, level) for level in LEVELS}
    columns = []
    for level, covered in found.items():
        expected = _expected(level, overconfidence)
        error = math.sqrt(expected * (1 - expected) / ranks.numel())
        columns.append(f"{covered:.3f} ± {error:.3f} ({expected:.3f})")
        assert abs(covered - expected) < TOLERANCE, (what, level, covered, expected)
    print(f"| {what} | {' | '.join(columns)} |")


@pytest.mark.parametrize("estimator", ["weight-sample", "local"])
def test_an_exact_posterior_is_calibrated_and_a_wrong_one_is_not(tmp_path, estimator):
    """N(0, 1) and one weight per observation: 10,800 independent weights."""
    simulation = _standard_normal()
    guide = simulation.infer(tmp_path, estimator)
    _check_coverage(f"weights, N(0, 1), `{estimator}`", simulation.ranks(guide), 1.0)
    image = torch.randn(5, 5, 5, dtype=torch.double)
    _check_coverage(f"predictions, N(0, 1), `{estimator}`", simulation.prediction_ranks(guide, image), 1.0)

    with pytest.raises(AssertionError):
        _check_coverage("tempered", simulation.ranks(simulation.infer(tmp_path, estimator, beta=2.0)), 1.0)
    guide.set_scale(SITE, 0.5 * guide.scale(SITE).detach())
    with pytest.raises(AssertionError):
        _check_coverage("halved", simulation.ranks(guide), 1.0)
    with pytest.raises(AssertionError):
        _check_coverage("halved", simulation.prediction_ranks(guide, 3 * image), 1.0)


@pytest.mark.parametrize("family", ["gaussian", "dwp"])
@pytest.mark.parametrize("whitened", [True, False])
def test_under_a_correlated_prior_the_overconfidence_is_that_of_theory(linear_gaussian, tmp_path, family, whitened):
    """In the prior's coordinates and in the weights; over all weights of all replicates."""
    if family == "gaussian":
        density = random_density("gaussian").requires_grad_(False)
        mean, covariance = density.loc, density.scale_tril @ density.scale_tril.T
    else:
        density, exact = linear_gaussian((3, 3, 3), 3, standardized=True)
        mean, covariance = exact.mean, exact.covariance_matrix
    prior = DeepWeightPrior(density.requires_grad_(False)).expand([REPLICATES, 1]).to_event(2)
    unit = density.scale_tril if whitened else density.scale_tril.square().sum(-1).sqrt().diag()
    simulation = Simulation(prior, 0.3 * torch.randn(6, 6, 6).double(), mean, covariance, unit)
    guide = simulation.infer(tmp_path)
    loc, scale = (part.detach().flatten(1) for part in guide.posterior(SITE))
    best = simulation.best.diagonal().sqrt()
    assert float(((loc - simulation.mean) / best).square().mean().sqrt()) < 0.5
    assert float((scale / best).log().square().mean().sqrt()) < 0.1

    overconfidence = simulation.overconfidence()
    assert overconfidence.mean() > 1.05
    _check_coverage(f"weights, `{family}`", simulation.ranks(guide), overconfidence)
    # Theory predicts miscalibration, most where q is narrowest relative to the truth.
    assert _uniformity(simulation.ranks(guide)[:, overconfidence.argmax()]) < 1e-3
    image = torch.randn(5, 5, 5, dtype=torch.double)
    new = simulation.prediction_overconfidence(image)
    _check_coverage(f"predictions, `{family}`", simulation.prediction_ranks(guide, image), new)
