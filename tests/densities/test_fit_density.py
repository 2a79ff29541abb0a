"""Fits of kernel distributions to kernels of known density."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from dwp_pyro.config.names import FAMILIES
from dwp_pyro.densities import DENSITIES, BlockKernels, KernelDistribution, KernelFlow, KernelMixture
from dwp_pyro.densities.fit_density import fit_density, score_kernels
from dwp_pyro.densities.gaussian import fold_moments, gaussian_of
from dwp_pyro.runtime.errors import PriorError


def fit(
    family: str, kernels: Tensor, steps: int, bootstraps: int = 2, identities: Tensor | None = None
) -> tuple[KernelDistribution, dict[str, float]]:
    """Fit kernels of consecutive bootstraps of equal size, all distinct unless `identities` are given."""
    n = len(kernels)
    block = BlockKernels(
        kernels, torch.arange(n) * bootstraps // n, torch.arange(n) if identities is None else identities
    )
    return fit_density(family, block, steps, 0, {"latent_size": 4} if family == "dwp" else {})


def correlated(size: int = 9) -> MultivariateNormal:
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs().float()
    return MultivariateNormal(torch.zeros(size), 0.01 * torch.exp(-distance / 4))


def mixture() -> MixtureSameFamily:
    """Return a mixture of two components of different mean and spread."""
    template = torch.linspace(-1, 1, 9)
    roots = 0.1 * correlated().scale_tril * torch.tensor([3.0, 1.0])[:, None, None]
    components = MultivariateNormal(torch.stack([0.3 * template, -0.1 * template]), scale_tril=roots)
    return MixtureSameFamily(Categorical(torch.tensor([0.5, 0.5])), components)


@pytest.mark.parametrize("family", FAMILIES)
def test_gaussian_kernels_recover_their_density(family):
    """Every family recovers a Gaussian."""
    density = correlated()
    kernels = density.sample((4000,)).reshape(-1, 3, 3)
    fitted, nats = fit(family, kernels, steps=60)
    truth = float(density.log_prob(kernels[2000:].flatten(1)).mean())
    # 54 parameters on 2,000 kernels cost about 54/2/2000 nats in expectation.
    assert abs(nats["full_gaussian"] - truth) < 0.15
    assert abs(nats["prior"] - truth) < 0.3
    fresh = density.sample((2000,)).reshape(-1, 3, 3)
    scores = score_kernels(fitted, fresh)
    for name in ("prior", "full_gaussian"):
        assert abs(scores[name] - float(density.log_prob(fresh.flatten(1)).mean())) < 0.15
    assert type(fitted) is DENSITIES[family]
    assert not fitted.training
    assert not any(parameter.requires_grad for parameter in fitted.parameters())


def test_the_vae_fits_kernels_of_many_scales_better_than_the_gaussian():
    """Heavy tails, as of trained kernels, need a latent variable."""
    kernels = (torch.randn(6000, 9).cumsum(1) * torch.randn(6000, 1).exp()).reshape(-1, 3, 3)
    _, nats = fit("dwp", kernels, steps=600)
    assert nats["standard_normal"] < nats["full_gaussian"]
    # Knowing the scale of each kernel is worth H(scale mixture) − H(Gaussian), about 7 nats here; the VAE finds most.
    assert nats["prior"] > nats["full_gaussian"] + 5


def test_a_mixture_is_recovered():
    """Held-out nats within .3 of the truth and far above the Gaussian's; draws have a high true density."""
    truth = mixture()
    kernels = truth.sample((12_000,)).reshape(-1, 3, 3)
    density, nats = fit("mixture", kernels, steps=1, bootstraps=3)
    exact = float(truth.log_prob(kernels[8000:].flatten(1)).mean())
    assert abs(nats["prior"] - exact) < 0.3
    assert nats["prior"] > nats["full_gaussian"] + 3
    assert isinstance(density, KernelMixture)
    assert len(density.log_weights) > 1
    drawn = density.rsample((2000,)).flatten(1)
    assert float(truth.log_prob(drawn).mean()) > exact - 0.5


def test_kernels_near_zero_are_a_component_of_their_own():
    """Dead kernels, a tenth here, are a hundredth as large: held-out nats within .4 of the truth."""
    root = correlated(25).scale_tril
    truth = MixtureSameFamily(
        Categorical(torch.tensor([0.9, 0.1])),
        MultivariateNormal(torch.zeros(2, 25), scale_tril=root * torch.tensor([1.0, 0.01])[:, None, None]),
    )
    kernels = truth.sample((9000,)).reshape(-1, 5, 5)
    _, nats = fit("mixture", kernels, steps=1, bootstraps=3)
    assert abs(nats["prior"] - float(truth.log_prob(kernels[6000:].flatten(1)).mean())) < 0.4
    assert nats["prior"] > nats["full_gaussian"] + 5


@pytest.mark.slow
def test_the_flow_fits_a_banana_better_than_the_gaussian():
    """Each weight near the square of the previous one: held-out nats at most .5 below the truth."""
    n = 6000
    noise = torch.randn(n, 4)
    columns = [noise[:, 0]]
    for i in range(1, 4):
        columns.append(0.5 * columns[-1].square() - 0.5 + 0.3 * noise[:, i])
    kernels = torch.stack(columns, 1).reshape(-1, 2, 2)
    truth = float((Normal(0, 1).log_prob(noise[n // 2 :]).sum(1) - 3 * math.log(0.3)).mean())
    _, nats = fit("flow", kernels, steps=600)
    assert nats["prior"] > nats["full_gaussian"] + 1
    assert truth - 0.5 < nats["prior"] < truth + 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_of_held_out_kernels(family):
    """Of three bootstraps the last is scored and the second chosen on: the controls are fitted to the first."""
    kernels = correlated().sample((1200,)).reshape(-1, 3, 3)
    kernels[800:] *= 5
    density, nats = fit(family, kernels, steps=5, bootstraps=3)
    measured = kernels[800:]
    control = gaussian_of(fold_moments(kernels[:400], torch.arange(400)))
    assert abs(nats["full_gaussian"] - float(control.log_prob(measured.flatten(1)).mean())) < 0.01
    isotropic = Normal(0.0, kernels[:400].square().mean().sqrt())
    assert abs(nats["isotropic"] - float(isotropic.log_prob(measured).sum((1, 2)).mean())) < 0.1
    # The final density is fitted to all kernels.
    assert score_kernels(density, measured)["prior"] > nats["prior"] + 20


@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_kernels_are_not_memorized(family):
    """Twenty kernels per bootstrap, each repeated a hundred times: held-out kernels reveal an unbounded density."""
    base = correlated(27).sample((60,))
    kernels = base.repeat_interleave(100, 0).reshape(-1, 3, 3, 3)
    _, nats = fit(family, kernels, steps=100, bootstraps=3, identities=torch.arange(6000) // 100)
    assert nats["prior"] < float(correlated(27).log_prob(base[40:]).mean()) + 5


def test_the_density_of_dead_kernels_in_a_mixture_has_a_limit():
    """Half of the kernels are zero: a component of variance 10⁻⁶ has 27 log 10³ nats more than N(0, 1) there."""
    nats = []
    for count in (400, 8000):
        kernels = torch.randn(count, 3, 3, 3)
        kernels[::2] = 0
        mixture = KernelMixture((3, 3, 3), 2)
        mixture.fit(kernels, 0)
        nats.append(float(mixture.log_prob_standardized(torch.zeros(27))))
    limit = 27 * (math.log(1e3) - 0.5 * math.log(2 * math.pi))
    assert nats == [pytest.approx(limit, abs=2), pytest.approx(limit, abs=2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_units(family):
    """Kernels scaled by c lose D·log c nats under the prior and its controls."""
    kernels = correlated().sample((1500,)).reshape(-1, 3, 3)
    results = [fit(family, c * kernels, steps=20)[1] for c in (1.0, 10.0)]
    for name in ("prior", "full_gaussian", "isotropic"):
        shift = results[0][name] - results[1][name]
        assert abs(shift - 9 * math.log(10)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_snapshots_of_a_kernel_do_not_count_as_kernels(family):
    """Few kernels with many near copies: the held-out density stays above that of N(0, 1) less 27 nats."""
    base = torch.randn(30, 27)
    kernels = (base.repeat(6, 1) + 1e-3 * torch.randn(180, 27)).reshape(-1, 3, 3, 3)
    _, nats = fit(family, kernels, steps=10, bootstraps=1, identities=torch.arange(180) % 30)
    assert nats["full_gaussian"] > nats["standard_normal"] - 27
    assert nats["prior"] > nats["standard_normal"] - 27


@pytest.mark.parametrize("family", FAMILIES)
def test_two_kernels_are_enough(family):
    density, nats = fit(family, torch.randn(2, 3, 3), steps=3, bootstraps=1)
    assert all(math.isfinite(value) for value in nats.values())
    assert density.rsample([5]).shape == (5, 3, 3)
    assert density.rsample([5]).isfinite().all()


def test_the_score_is_the_importance_weighted_bound(linear_gaussian):
    vae, exact = linear_gaussian((3, 3), standardized=True)
    kernels = exact.sample((50,)).reshape(-1, 3, 3)
    nats = score_kernels(vae, kernels, samples=7)
    assert abs(nats["prior"] - float(exact.log_prob(kernels.flatten(1)).mean())) < 1e-9
    normal = -0.5 * (kernels.square().flatten(1).sum(1).mean() + 9 * math.log(2 * math.pi))
    assert abs(nats["standard_normal"] - float(normal)) < 1e-9


def test_the_score_is_a_mean_over_all_batches(linear_gaussian):
    """Batches of 50 and of 20 kernels."""
    vae, exact = linear_gaussian((3, 3), standardized=True)
    kernels = exact.sample((70,)).reshape(-1, 3, 3)
    nats = score_kernels(vae, kernels, 500)
    assert abs(nats["prior"] - float(exact.log_prob(kernels.flatten(1)).mean())) < 1e-9


def test_the_score_of_a_gaussian_is_its_control():
    _, nats = fit("gaussian", correlated().sample((300,)).reshape(-1, 3, 3), steps=1)
    assert abs(nats["prior"] - nats["full_gaussian"]) < 1e-4
    assert set(nats) == {"prior", "standard_normal", "isotropic", "full_gaussian"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_fit(family):
    kernels = torch.randn(200, 3, 3)
    a, b = (fit(family, kernels, steps=15)[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_choice_is_made_without_the_held_out_kernels_and_the_final_fit_has_all(monkeypatch):
    counts = []

    def record(self, kernels, settings, *, validation=None, chosen=None):
        counts.append(len(kernels))
        return 0

    monkeypatch.setattr(KernelMixture, "fit", record)
    fit("mixture", torch.randn(60, 2, 2), steps=1, bootstraps=3)
    assert counts == [20, 60]


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit("gaussian", torch.randn(20, 2, 2), steps=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _degenerate(name: str) -> Tensor:
    """Return a bank of 200 kernels whose covariance is singular or ill-conditioned."""
    noise = torch.randn(200, 9)
    banks = {
        "rank 2": noise[:, :2] @ torch.randn(2, 9),
        "all alike": torch.full((200, 9), 0.1),
        "all but one are 0": torch.cat([torch.zeros(199, 9), torch.ones(1, 9)]),
        "half are 0": noise * (torch.arange(200) % 2)[:, None],
        "faint": 1e-20 * noise,
        "of fifteen sizes": noise * torch.logspace(-12, 3, 200)[torch.randperm(200), None],
        "one far off": torch.cat([1e6 * torch.ones(1, 9), 0.01 * noise[1:]]),
    }
    return banks[name].reshape(-1, 3, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "bank", ["rank 2", "all alike", "all but one are 0", "half are 0", "faint", "of fifteen sizes", "one far off"]
)
def test_a_degenerate_bank_has_a_proper_density(family, bank):
    """Positive scales; finite scores, parameters, draws and log-densities."""
    kernels = _degenerate(bank)
    density, nats = fit(family, kernels, steps=30)
    assert all(math.isfinite(value) for value in nats.values())
    assert (density.scale_tril.diagonal() > 0).all() and density.log_abs_det().isfinite()
    assert all(tensor.isfinite().all() for tensor in density.state_dict().values())
    assert density.rsample([20]).isfinite().all()
    assert density.log_prob_estimate(kernels).isfinite().all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_scales_of_a_vae_are_bounded_whatever_its_weights(sign):
    vae = DENSITIES["dwp"]((3, 3))
    torch.nn.init.constant_(vae.decoder[-1].bias, sign * 1e6)
    torch.nn.init.constant_(vae.encoder[-1].bias, sign * 1e6)
    for _, scale in (vae.decode(torch.zeros(vae.latent_size)), vae.encode(torch.zeros(3, 3))):
        assert (scale > 0.002).all() and (scale < 404).all()


def test_a_fit_with_a_non_finite_loss_raises(monkeypatch):
    """Single steps are skipped; ten in a row raise."""
    loss, calls = KernelFlow.loss, []

    def spoil(bad):
        def spoiled(*arguments):
            calls.append(None)
            return loss(*arguments) * (math.nan if bad(len(calls)) else 1.0)

        monkeypatch.setattr(KernelFlow, "loss", spoiled)

    kernels = torch.randn(40, 2, 2)
    spoil(lambda call: call % 3 == 0)
    density, _ = fit("flow", kernels, steps=15)
    assert all(tensor.isfinite().all() for tensor in density.state_dict().values())
    calls.clear()
    spoil(lambda call: call > 3)
    with pytest.raises(PriorError, match="NaN or infinite in 10 steps in a row.*family 'gaussian'"):
        fit("flow", kernels, steps=30)
    assert len(calls) == 13


@pytest.mark.parametrize("family", ["dwp", "flow"])
@pytest.mark.parametrize("chosen", [0, 3])
def test_a_fit_without_a_choice_ends_at_the_chosen_step(family, chosen):
    """At step 0 it is the full-covariance Gaussian."""
    kernels = correlated().sample((100,)).reshape(-1, 3, 3)
    density = DENSITIES[family]((3, 3))
    before = {name: value.clone() for name, value in density.state_dict().items()}
    assert density.fit(kernels, 50, chosen=chosen) == chosen
    changed = any(not torch.equal(value, before[name]) for name, value in density.state_dict().items())
    assert changed == (chosen > 0)
