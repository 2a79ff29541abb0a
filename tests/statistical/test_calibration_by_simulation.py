"""Simulation-based calibration of the whole inference (Talts et al. 2018): weights from the prior, data from them,
and the place of the true weights among draws of the posterior inferred, which is uniform where the posterior is exact.

The network is one 3×3×3 convolution; its output channels, each with an input channel of its own, are the replicates.
Observations are Gaussian, so that the posterior N(m, Λ⁻¹) is known, and the best factorised q: N(m, 1/Λ_ii). A weight
is then spread κ_i = √(Λ_ii Λ⁻¹_ii) ≥ 1 times as wide around m as q says: by how much q is too sure is known too.

$ pytest -s tests/statistical/test_calibration_by_simulation.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import SVI
from scipy import stats
from torch import Tensor, nn

from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO
from dwp_pyro.inference.finite_steps import FiniteSteps
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.inference.moving_noise import MovingNoise
from dwp_pyro.inference.svi import OneOptimizer
from dwp_pyro.models.bayesian import bayesianize
from tests.conftest import random_density

REPLICATES = 400
NOISE = 0.5
DRAWS = 199  # of the posterior: 200 places
LEVELS = (0.5, 0.8, 0.9, 0.95)
SITE = "0.weight"


@pytest.fixture(autouse=True)
def _noise_moves(monkeypatch):
    """As it does with more weights than these."""
    monkeypatch.setattr("dwp_pyro.inference.moving_noise._FEWEST", 1)


class Simulation:
    """One data set a replicate, simulated from a prior, and what is inferred from it.

    Args:
        prior: over all kernels, [REPLICATES, 1, 3, 3, 3].
        image: that every replicate sees, [X, Y, Z].
        mean, covariance: of a kernel's prior, [27] and [27, 27].
    """

    def __init__(self, prior: pyro.distributions.TorchDistribution, image: Tensor, mean: Tensor, covariance: Tensor):
        self.prior = prior
        self.image = image.expand(1, REPLICATES, *image.shape)
        self.windows = _windows(image)
        self.weights = prior.sample()
        self.seen = self._observe(self.windows)
        prior_precision = covariance.inverse()
        self.precision = prior_precision + self.windows.T @ self.windows / NOISE**2
        self.mean = torch.linalg.solve(
            self.precision, (prior_precision @ mean)[:, None] + self.windows.T @ self.seen.T / NOISE**2
        ).T

    def _observe(self, windows: Tensor) -> Tensor:
        """[REPLICATES, voxels]."""
        clean = self.weights.flatten(1) @ windows.T
        return clean + NOISE * torch.randn_like(clean)

    def infer(self, estimator: str = "shared", beta: float = 1.0, steps: int = 800) -> MeanFieldNormal:
        """By what `svi` uses: sites, guide, ELBO, optimiser."""
        network = nn.Sequential(nn.Conv3d(REPLICATES, REPLICATES, 3, groups=REPLICATES, bias=False)).double()
        guide = MeanFieldNormal(bayesianize(network, {SITE: self.prior}), scale=0.3)

        def model() -> None:
            output = network(self.image).flatten(2)[0]
            pyro.sample("y", Normal(output, NOISE).to_event(2), obs=self.seen)

        optimizer = torch.optim.AdamW(guide.parameters(), weight_decay=0.0, fused=True)
        elbo = BatchedMeanFieldELBO(beta=beta)
        svi = SVI(model, guide, OneOptimizer(FiniteSteps(optimizer), elbo), elbo)
        noise = MovingNoise(seed=0)
        local = LocalReparameterization(guide.posterior) if estimator == "local" else nullcontext()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / steps))
            with noise, local:
                svi.step()
        return guide

    def places(self, guide: MeanFieldNormal) -> Tensor:
        """Draws that lie below the true weight, [REPLICATES, 27]."""
        return sum((guide.draw()[SITE] < self.weights).long() for _ in range(DRAWS)).flatten(1)

    def places_of_new(self, guide: MeanFieldNormal, image: Tensor) -> Tensor:
        """The same of what would be seen in the first window of another image, [REPLICATES, 1]."""
        windows = _windows(image)[:1]
        truth = self._observe(windows)
        below = torch.zeros_like(truth, dtype=torch.long)
        for _ in range(DRAWS):
            clean = guide.draw()[SITE].flatten(1) @ windows.T
            below += clean + NOISE * torch.randn_like(clean) < truth
        return below

    def overconfidence(self) -> Tensor:
        """κ of each weight, [27]."""
        return (self.precision.inverse().diagonal() * self.precision.diagonal()).sqrt()

    def overconfidence_of_new(self, image: Tensor) -> float:
        """The same ratio for the prediction of `places_of_new`."""
        (window,) = _windows(image)[:1]
        exact = window @ self.precision.inverse() @ window + NOISE**2
        factorised = (window.square() / self.precision.diagonal()).sum() + NOISE**2
        return float((exact / factorised).sqrt())


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
    return Simulation(prior, _impulse(), torch.zeros(27).double(), torch.eye(27).double())


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
    """Print it, and compare it with theory: four levels, a false alarm in a thousand seeds."""
    found: Mapping[float, float] = {level: _coverage(places, level) for level in LEVELS}
    cells = []
    for level, covered in found.items():
        expected = _expected(level, overconfidence)
        error = math.sqrt(expected * (1 - expected) / places.numel())
        cells.append(f"{covered:.3f} ± {error:.3f} ({expected:.3f})")
        assert abs(covered - expected) < 3.7 * error + 1e-9, (what, level, covered, expected)
    print(f"| {what} | {' | '.join(cells)} |")


@pytest.mark.parametrize("estimator", ["shared", "local"])
def test_an_exact_posterior_is_calibrated_and_a_wrong_one_is_not(estimator):
    """N(0, 1) and one weight an observation: 10,800 weights, all independent."""
    simulation = _standard_normal()
    guide = simulation.infer(estimator)
    assert _uniformity(simulation.places(guide)) > 1e-3
    _check_coverage(f"weights, N(0, 1), `{estimator}`", simulation.places(guide), 1.0)
    image = torch.randn(3, 3, 3, dtype=torch.double)
    _check_coverage(f"predictions, N(0, 1), `{estimator}`", simulation.places_of_new(guide, image), 1.0)

    assert _uniformity(simulation.places(simulation.infer(estimator, beta=2.0))) < 1e-6
    guide.set_scale(SITE, 0.5 * guide.posterior(SITE)[1].detach())
    assert _uniformity(simulation.places(guide)) < 1e-6
    with pytest.raises(AssertionError):
        _check_coverage("halved", simulation.places_of_new(guide, 3 * image), 1.0)


@pytest.mark.parametrize("family", ["gaussian", "dwp"])
def test_under_a_correlated_prior_the_posterior_is_as_sure_as_mean_field_theory_says(linear_gaussian, family):
    """One weight a replicate, that these be independent."""
    if family == "gaussian":
        density = random_density("gaussian").requires_grad_(False)
        mean, covariance = density.loc, density.scale_tril @ density.scale_tril.T
    else:
        density, exact = linear_gaussian((3, 3, 3), 3, standardised=True)
        mean, covariance = exact.mean, exact.covariance_matrix
    prior = DeepWeightPrior(density.requires_grad_(False)).expand([REPLICATES, 1]).to_event(2)
    simulation = Simulation(prior, 0.3 * torch.randn(6, 6, 6).double(), mean, covariance)
    guide = simulation.infer()
    loc, scale = (part.detach().flatten(1) for part in guide.posterior(SITE))
    best = simulation.precision.diagonal().rsqrt()
    assert float(((loc - simulation.mean) / best).square().mean().sqrt()) < 0.1
    assert float((scale / best).log().square().mean().sqrt()) < 0.1

    chosen = torch.arange(REPLICATES) % 27
    places = simulation.places(guide)[torch.arange(REPLICATES), chosen]
    overconfidence = simulation.overconfidence()
    assert overconfidence.mean() > 1.1
    _check_coverage(f"weights, `{family}`", places, overconfidence[chosen])
    # As theory says it is not calibrated, least of all where q is too narrow by most.
    assert _uniformity(simulation.places(guide)[:, overconfidence.argmax()]) < 1e-3
    image = torch.randn(3, 3, 3, dtype=torch.double)
    new = simulation.overconfidence_of_new(image)
    _check_coverage(f"predictions, `{family}`", simulation.places_of_new(guide, image), new)
