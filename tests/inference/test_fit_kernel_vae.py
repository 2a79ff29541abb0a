"""The fit of a block's density, on kernels whose density is known."""

import math

import torch
from torch.distributions import MultivariateNormal

from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.inference.fit_kernel_vae import fit_kernel_vae, score_kernels

OPTIONS = {"latent_size": 4, "hidden": (32, 32), "seed": 0}


def correlated(n: int, size: int = 9) -> MultivariateNormal:
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs().float()
    return MultivariateNormal(torch.zeros(size), 0.01 * torch.exp(-distance / 4))


def test_gaussian_kernels_get_their_own_density():
    density = correlated(9)
    kernels = density.sample((4000,)).reshape(-1, 3, 3)
    groups = torch.arange(4000) // 2000
    vae, nats = fit_kernel_vae(kernels, groups, torch.arange(4000), steps=60, **OPTIONS)
    truth = float(density.log_prob(kernels[groups == 1].flatten(1)).mean())
    # 54 parameters on 2,000 kernels cost about 54/2/2000 nats in expectation.
    assert abs(nats["full_gaussian"] - truth) < 0.15
    assert abs(nats["prior"] - truth) < 0.3
    fresh = density.sample((2000,)).reshape(-1, 3, 3)
    assert abs(score_kernels(vae, fresh)["full_gaussian"] - float(density.log_prob(fresh.flatten(1)).mean())) < 0.15


def test_kernels_of_many_scales_are_beyond_the_gaussian_and_not_beyond_the_vae():
    """Heavy tails, as trained kernels have: only a density with a latent variable can follow them."""
    n = 6000
    kernels = (torch.randn(n, 9).cumsum(1) * torch.randn(n, 1).exp()).reshape(-1, 3, 3)
    groups = torch.arange(n) // 3000
    _, nats = fit_kernel_vae(kernels, groups, torch.arange(n), steps=600, **OPTIONS)
    assert nats["standard_normal"] < nats["full_gaussian"]
    # Knowing the scale of each kernel is worth H(scale mixture) − H(Gaussian), about 7 nats here; the VAE finds most.
    assert nats["prior"] > nats["full_gaussian"] + 5


def test_raw_units():
    """Kernels scaled by c lose D·log c nats, for the prior and its control alike."""
    kernels = correlated(9).sample((1500,)).reshape(-1, 3, 3)
    ids = torch.arange(1500)
    results = [fit_kernel_vae(c * kernels, ids // 750, ids, steps=20, **OPTIONS)[1] for c in (1.0, 10.0)]
    for name in ("prior", "full_gaussian"):
        shift = results[0][name] - results[1][name]
        assert abs(shift - 9 * torch.tensor(10.0).log()) < 0.05


def test_snapshots_of_one_kernel_do_not_pass_for_several():
    """Few kernels seen through many near copies: the held-out density stays sane."""
    base = torch.randn(30, 27)
    kernels = (base.repeat(6, 1) + 1e-3 * torch.randn(180, 27)).reshape(-1, 3, 3, 3)
    ids = torch.arange(180) % 30
    _, nats = fit_kernel_vae(kernels, torch.zeros(180, dtype=torch.long), ids, steps=10, **OPTIONS)
    assert nats["full_gaussian"] > nats["standard_normal"] - 27


def test_two_kernels_are_enough():
    kernels = torch.randn(2, 3, 3)
    vae, nats = fit_kernel_vae(kernels, torch.zeros(2, dtype=torch.long), torch.arange(2), steps=3, **OPTIONS)
    assert all(torch.isfinite(torch.tensor(list(nats.values()))))
    assert vae.rsample([5]).shape == (5, 3, 3)


def test_the_score_is_the_importance_weighted_bound(linear_gaussian):
    vae, exact = linear_gaussian((3, 3), standardised=True)
    kernels = exact.sample((50,)).reshape(-1, 3, 3)
    nats = score_kernels(vae, kernels, samples=7)
    assert abs(nats["prior"] - float(exact.log_prob(kernels.flatten(1)).mean())) < 1e-9
    normal = -0.5 * (kernels.square().flatten(1).sum(1).mean() + 9 * math.log(2 * math.pi))
    assert abs(nats["standard_normal"] - float(normal)) < 1e-9


def test_the_same_seed_gives_the_same_fit():
    kernels = torch.randn(200, 3, 3)
    ids = torch.arange(200)
    a, b = (fit_kernel_vae(kernels, ids // 100, ids, steps=15, **OPTIONS)[0] for _ in range(2))
    assert isinstance(a, KernelVAE)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
