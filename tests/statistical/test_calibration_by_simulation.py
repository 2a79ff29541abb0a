"""Simulation-based calibration of the whole inference (Talts et al. 2018): weights from the prior, data from them,
and the place of the true weights among draws of the posterior inferred, which is uniform where the posterior is exact.

The network is one 3×3×3 convolution; its output channels, each with an input channel of its own, are the replicates.
Observations are Gaussian, so that the posterior N(m, Λ⁻¹) is known, and the best q that is independent in coordinates
v, w = A v: N(m, A D⁻¹ Aᵀ), D the diagonal of AᵀΛA. A weight is then spread κ_i ≥ 1 times as wide around m as q says:
by how much q is too sure is known too. Inference is that of `svi`: its loop, its defaults, its units.

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

from dwp_pyro.config import SviConfig
from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.svi import fit
from dwp_pyro.models.bayesian import bayesianize
from dwp_pyro.pipeline.fit_target import training_schedule
from dwp_pyro.pipeline.svi import annealed
from tests.conftest import random_density

REPLICATES = 400
NOISE = 0.5
DRAWS = 199  # of the posterior: 200 places
LEVELS = (0.5, 0.8, 0.9, 0.95)
TOLERANCE = 0.02  # of a coverage
SITE = "0.weight"


class Regression(nn.Module):
    """p(y, W | image): a Bayesian convolution and Gaussian noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, seen: Tensor) -> None:
        output = self.network(image).flatten(2)
        pyro.sample("y", Normal(output, NOISE).to_event(3), obs=seen)


class Simulation:
    """One data set a replicate, simulated from a prior, and what is inferred from it.

    Args:
        prior: Prior over all kernels, [REPLICATES, 1, 3, 3, 3].
        image: Image that every replicate sees, [X, Y, Z].
        mean, covariance: Of a kernel's prior, [27] and [27, 27].
        unit: A, [27, 27].
    """

    def __init__(
        self,
        prior: pyro.distributions.TorchDistribution,
        image: Tensor,
        mean: Tensor,
        covariance: Tensor,
        unit: Tensor,
    ) -> None:
        self.prior = prior
        self.unit = unit
        self.image = image.expand(1, REPLICATES, *image.shape)
        self.windows = _windows(image)
        self.weights = prior.sample()
        self.seen = self._observe(self.windows)
        prior_precision = covariance.inverse()
        self.precision = prior_precision + self.windows.T @ self.windows / NOISE**2
        self.mean = torch.linalg.solve(
            self.precision, (prior_precision @ mean)[:, None] + self.windows.T @ self.seen.T / NOISE**2
        ).T
        best = (unit.T @ self.precision @ unit).diagonal().reciprocal()
        self.best = unit @ best.diag() @ unit.T

    def _observe(self, windows: Tensor) -> Tensor:
        """[REPLICATES, voxels]."""
        clean = self.weights.flatten(1) @ windows.T
        return clean + NOISE * torch.randn_like(clean)

    def infer(self, folder: Path, estimator: str = "shared", beta: float = 1.0) -> MeanFieldNormal:
        """By the loop of `svi` at its defaults, from draws of the prior."""
        config = SviConfig(estimator=estimator)
        network = nn.Sequential(nn.Conv3d(REPLICATES, REPLICATES, 3, groups=REPLICATES, bias=False)).double()
        bayesianize(network, {SITE: self.prior})
        diagonal = self.unit.diagonal()
        unit = diagonal if torch.equal(self.unit, diagonal.diag()) else self.unit
        guide = MeanFieldNormal({SITE: self.prior.sample()}, config.init_scale, {SITE: unit})
        schedule = training_schedule(
            config, 0, config.steps, lambda fraction: beta * annealed(config, fraction), estimator
        )
        data = [(self.image[0], self.seen)] * config.steps
        (folder / "c").unlink(missing_ok=True)
        fit(Regression(network), guide, data, 1, schedule, folder / "c", description="", log=lambda step, metrics: None)
        return guide

    def places(self, guide: MeanFieldNormal) -> Tensor:
        """Draws that lie below the true weight, [REPLICATES, 27]."""
        return sum((guide.draw()[SITE] < self.weights).long() for _ in range(DRAWS)).flatten(1)

    def places_of_new(self, guide: MeanFieldNormal, image: Tensor) -> Tensor:
        """The same of what would be seen in the windows of another image, [REPLICATES, windows]."""
        windows = _windows(image)
        truth = self._observe(windows)
        below = torch.zeros_like(truth, dtype=torch.long)
        for _ in range(DRAWS):
            clean = guide.draw()[SITE].flatten(1) @ windows.T
            below += clean + NOISE * torch.randn_like(clean) < truth
        return below

    def overconfidence(self) -> Tensor:
        """κ of each weight, [27]."""
        return (self.precision.inverse().diagonal() / self.best.diagonal()).sqrt()

    def overconfidence_of_new(self, image: Tensor) -> Tensor:
        """The same ratio for the predictions of `places_of_new`, [windows]."""
        windows = _windows(image)

        def variance(covariance: Tensor) -> Tensor:
            return ((windows @ covariance) * windows).sum(1) + NOISE**2

        return (variance(self.precision.inverse()) / variance(self.best)).sqrt()


def _windows(image: Tensor) -> Tensor:
    """Image [X, Y, Z] → what each output voxel sees, [voxels, 27]."""
    return image.unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1).flatten(3).flatten(0, 2)


def _impulse() -> Tensor:
    """Each output voxel reads one weight: the posterior is factorised where the prior is."""
    image = torch.zeros(5, 5, 5, dtype=torch.double)
    image[2, 2, 2] = 1.0
    return image


def _standard_normal() -> Simulation:
    prior = Normal(torch.zeros(REPLICATES, 1, 3, 3, 3).double(), 1.0).to_event(5)
    identity = torch.eye(27).double()
    return Simulation(prior, _impulse(), torch.zeros(27).double(), identity, identity)


def _uniformity(places: Tensor) -> float:
    """p of χ² over 20 bins: 10⁻³ of the seeds fall below 10⁻³."""
    counts = torch.bincount(places.flatten() // 10, minlength=20)
    return float(stats.chisquare(counts.numpy()).pvalue)


def _coverage(places: Tensor, level: float) -> float:
    """Part of the true values within the central interval of the draws."""
    return float(((places + 0.5) / (DRAWS + 1) - 0.5).abs().lt(level / 2).double().mean())


def _expected(level: float, overconfidence: Tensor | float) -> float:
    """Coverage where the truth is spread so many times as wide as q."""
    reach = stats.norm.ppf(0.5 + level / 2) / torch.as_tensor(overconfidence)
    return float((2 * torch.special.ndtr(reach) - 1).mean())


def _check_coverage(what: str, places: Tensor, overconfidence: Tensor | float) -> None:
    """Print it, and compare it with theory."""
    found: Mapping[float, float] = {level: _coverage(places, level) for level in LEVELS}
    cells = []
    for level, covered in found.items():
        expected = _expected(level, overconfidence)
        error = math.sqrt(expected * (1 - expected) / places.numel())
        cells.append(f"{covered:.3f} ± {error:.3f} ({expected:.3f})")
        assert abs(covered - expected) < TOLERANCE, (what, level, covered, expected)
    print(f"| {what} | {' | '.join(cells)} |")


@pytest.mark.parametrize("estimator", ["shared", "local"])
def test_an_exact_posterior_is_calibrated_and_a_wrong_one_is_not(tmp_path, estimator):
    """N(0, 1) and one weight per observation: 10,800 weights, all independent."""
    simulation = _standard_normal()
    guide = simulation.infer(tmp_path, estimator)
    _check_coverage(f"weights, N(0, 1), `{estimator}`", simulation.places(guide), 1.0)
    image = torch.randn(5, 5, 5, dtype=torch.double)
    _check_coverage(f"predictions, N(0, 1), `{estimator}`", simulation.places_of_new(guide, image), 1.0)

    with pytest.raises(AssertionError):
        _check_coverage("tempered", simulation.places(simulation.infer(tmp_path, estimator, beta=2.0)), 1.0)
    guide.set_scale(SITE, 0.5 * guide.scale(SITE).detach())
    with pytest.raises(AssertionError):
        _check_coverage("halved", simulation.places(guide), 1.0)
    with pytest.raises(AssertionError):
        _check_coverage("halved", simulation.places_of_new(guide, 3 * image), 1.0)


@pytest.mark.parametrize("family", ["gaussian", "dwp"])
@pytest.mark.parametrize("whitened", [True, False])
def test_under_a_correlated_prior_the_posterior_is_as_sure_as_theory_says(linear_gaussian, tmp_path, family, whitened):
    """In the prior's coordinates and in the weights themselves; over all weights of all replicates."""
    if family == "gaussian":
        density = random_density("gaussian").requires_grad_(False)
        mean, covariance = density.loc, density.scale_tril @ density.scale_tril.T
    else:
        density, exact = linear_gaussian((3, 3, 3), 3, standardised=True)
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
    _check_coverage(f"weights, `{family}`", simulation.places(guide), overconfidence)
    # As theory says it is not calibrated, least of all where q is too narrow by most.
    assert _uniformity(simulation.places(guide)[:, overconfidence.argmax()]) < 1e-3
    image = torch.randn(5, 5, 5, dtype=torch.double)
    new = simulation.overconfidence_of_new(image)
    _check_coverage(f"predictions, `{family}`", simulation.places_of_new(guide, image), new)
