"""The summary of a posterior: ELBO and null models, blocks and their priors, and convergence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dwp_pyro.config.training import SviConfig
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.optimization import guide_function
from dwp_pyro.inference.schedule import step_seed
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.training.network_training import TrainingSetup
from dwp_pyro.training.posterior_summary import (
    block_summaries,
    evaluate_elbo,
    mean_and_error,
    report_nulls,
    report_unconverged,
    summarize,
)
from dwp_pyro.training.target import Method

SITE = "0.weight"


def make_setup(scale: float = 0.2) -> TrainingSetup:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1))
    weight = network[0].weight.detach()
    prior = make_prior("normal", SITE, weight, scale=0.5)
    guide = MeanFieldNormal(bayesianize(network, {SITE: prior}), scale)
    return TrainingSetup(network, guide, {SITE: "up1"}, {SITE: lambda: prior})


@pytest.fixture
def patches() -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    image = torch.randn(9, 1, 4, 4, 4)
    return [(each, (each > 0.5).long(), torch.ones_like(each)) for each in image]


def test_blocks_are_summarized_in_units_of_their_prior():
    setup = make_setup()
    loc = setup.guide.means()[SITE]
    found = block_summaries([setup])["up1"]
    assert_close(found["s_over_prior"], 0.4)
    assert_close(found["shift_over_prior"], float((loc / 0.5).square().mean().sqrt()))
    kl = 0.5 * ((0.2**2 + loc.square()) / 0.25 - 1 + 2 * math.log(0.5 / 0.2))
    assert_close(found["kl_per_kernel"], float(kl.sum() / 2))
    assert found["prior_scale"] == 0.5


def test_the_elbo_of_fixed_patches_is_that_of_all_of_them_at_once(patches):
    """One weight sample per noise for all patches."""
    setup = make_setup()
    model = SegmentationModel(setup.network, "dice-ce", 5, 100.0)
    parts = evaluate_elbo(model, setup.guide, patches, seed=3, noises=4)
    assert parts["elbo"].shape == (4, 9) and parts["log_likelihood"].unique().numel() == 4 * 9
    assert_close(parts["elbo"], parts["log_likelihood"] - parts["kl"] + parts["log_prior"])
    elbo, batch = MeanFieldELBO(), [torch.stack(each) for each in zip(*patches, strict=True)]
    for noise in range(4):
        torch.manual_seed(step_seed(3, noise))
        at_once = -elbo.loss(model, guide_function(setup.guide), *batch)
        assert float(parts["elbo"][noise].mean()) == pytest.approx(at_once, rel=1e-4, abs=1e-2)
    again = evaluate_elbo(model, setup.guide, patches, seed=3, noises=4)
    assert torch.equal(again["elbo"], parts["elbo"])


def test_the_error_of_an_elbo_is_that_over_weight_samples_and_patches():
    """Against means of many tables of noises, patches and residuals, each of which dominates once."""
    torch.manual_seed(0)
    parts = torch.randn(4000, 4, 1), torch.randn(4000, 1, 16), torch.randn(4000, 4, 16)
    for sizes in ((1.0, 0.2, 0.2), (0.1, 1.0, 0.2), (0.2, 0.2, 3.0)):
        tables = sum(size * part for size, part in zip(sizes, parts, strict=True))
        variance = sizes[0] ** 2 / 4 + sizes[1] ** 2 / 16 + sizes[2] ** 2 / 64
        errors = torch.tensor([mean_and_error(table)[1] for table in tables])
        assert float(errors.square().mean()) == pytest.approx(variance, rel=0.1), sizes


@pytest.mark.parametrize("seed", range(3))
def test_the_evaluation_has_patches_and_noise_of_no_training(seed):
    method = Method(command="svi", config=SviConfig(seed=seed), members=3, make_setup=lambda *_: None)
    trainings = [method.seed(member) for member in range(3)]
    steps = {step_seed(training, step) for training in trainings for step in range(10_000)}
    assert method.evaluation_seed not in trainings
    assert steps.isdisjoint(step_seed(method.evaluation_seed, noise) for noise in range(10))


def parts(elbo: list[float]) -> dict[str, torch.Tensor]:
    values = torch.tensor(elbo).view(2, 2)
    return {"elbo": values, "log_likelihood": values + 1, "kl": torch.ones(2, 2), "log_prior": 0 * values}


def test_a_null_model_that_is_as_good_is_reported(caplog):
    """Differences are taken under the same noise and on the same patches, so their error is not that of the ELBO."""
    fit = parts([-100.0, -120.0, -80.0, -100.0])
    rise = torch.tensor([[50.0, 51.0], [49.0, 50.0]])
    nulls = {"frozen": fit["elbo"] - rise, "prior": fit["elbo"] - 1 + torch.randn(2, 2)}
    summary = summarize([fit], nulls, [0.5], {})
    assert summary["elbo"] == -100 and summary["above_frozen"]["nats"] == pytest.approx(50)
    assert summary["above_frozen"]["error"] == pytest.approx(mean_and_error(rise)[1])
    assert summary["members"] == [{"dice": 0.5, "elbo": -100.0}]
    summary["above_prior"] = {"nats": 1.0, "error": 1.0}
    report_nulls(summary)
    assert "kernels drawn from the prior" in caplog.text and "stay at their start" not in caplog.text


@pytest.mark.parametrize(("slope", "warned"), [(-1.0, True), (0.0, False), (2.0, False)])
def test_a_run_whose_elbo_still_rises_is_reported(caplog, slope, warned):
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    records = [
        # The weight of the KL in the loss still rises, and hides what the ELBO does.
        {"stage": "svi", "step": step, "log_likelihood": -slope * step + 30 * noise[i], "kl": 900.0, "log_prior": -1.0}
        | {"loss": 900.0 * step / 600 + slope * step - 30 * noise[i] + 1}
        for i, step in enumerate(range(10, 600, 10))
    ]
    report_unconverged(records, "svi", 600)
    assert ("still raised the ELBO" in caplog.text) == warned
