"""Sums with their gradients at once, against the registered divergences and against autograd."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.testing import assert_close

from dwp_pyro.distributions import summed_divergence as module
from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.distributions.kernel_density import KernelGaussian
from dwp_pyro.distributions.log_scale_normal import LogScaleNormal, log_scale_normals
from dwp_pyro.distributions.log_uniform import APPROXIMATION, LogUniform
from dwp_pyro.distributions.summed_divergence import chunked_sum, kernel_changes, summed_divergence

SHAPE = (3, 2, 2, 2, 2)


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gaussian(centre: Tensor | None, scale: float) -> DeepWeightPrior:
    density = KernelGaussian(SHAPE[2:]).double()
    root = tensor(8, 8).tril()
    density.standardise_by(tensor(8), root - root.diagonal().diag() + (root.diagonal().abs() + 0.5).diag())
    return DeepWeightPrior(density, centre=centre, scale=scale).expand(SHAPE[:2])


PRIORS = {
    "N(0, 1)": lambda: Normal(torch.zeros((), dtype=torch.float64), 1.0).expand(SHAPE).to_event(5),
    "N(a, c²)": lambda: Normal(tensor(*SHAPE), torch.tensor(0.3, dtype=torch.float64)).to_event(5),
    "N(3, c²)": lambda: Normal(torch.tensor(3.0, dtype=torch.float64), 0.4).expand(SHAPE).to_event(5),
    "a scale a weight": lambda: Normal(tensor(*SHAPE), tensor(*SHAPE).exp()).to_event(5),
    "full covariance": lambda: gaussian(None, 1.0).to_event(2),
    "full covariance, moved": lambda: gaussian(tensor(*SHAPE), 0.4).to_event(2),
    "log-uniform": lambda: LogUniform().expand(SHAPE).to_event(5),
}


@pytest.mark.parametrize("name", PRIORS)
def test_it_is_the_sum_of_the_registered_divergence(name):
    """In value and in gradient, also where a factor β stands before it; the parameters stay as they are."""
    torch.manual_seed(0)
    prior = PRIORS[name]()
    parameters = [tensor(*SHAPE).requires_grad_(), tensor(*SHAPE).requires_grad_()]
    before = [each.detach().clone() for each in parameters]
    q = LogScaleNormal(*parameters).to_event(5)
    ours, stock = summed_divergence([(q, prior)]), kl_divergence(q, prior).sum()
    assert ours.dim() == 0
    assert_close(ours, stock, rtol=1e-10, atol=0)
    assert_close(torch.autograd.grad(0.7 * ours, parameters), torch.autograd.grad(0.7 * stock, parameters))
    assert all(map(torch.equal, parameters, before))


def test_the_sites_of_all_kinds_together_are_the_sum():
    """Two of each kind, of several sizes; a Normal that is no guide's among them, under a prior of its own."""
    torch.manual_seed(0)
    pairs = [
        (LogScaleNormal(*(tensor(*SHAPE).requires_grad_() for _ in range(2))).to_event(5), PRIORS[name]())
        for name in [*PRIORS, *PRIORS]
    ]
    for size in (3, 5):
        pairs.append((LogScaleNormal(*(tensor(size).requires_grad_() for _ in range(2))), LogUniform().expand([size])))
    loc = tensor(4).requires_grad_()
    pairs.append((Normal(loc, tensor(4).exp()).to_event(1), Normal(tensor(4), tensor(4).exp()).to_event(1)))
    parameters = [loc]
    for q, _ in pairs[:-1]:
        base = getattr(q, "base_dist", q)
        parameters += [base.loc, base.log_scale]
    ours, stock = summed_divergence(pairs), sum(kl_divergence(q, p).sum() for q, p in pairs)
    stack = ours.grad_fn.next_functions[0][0]
    nodes = [node.name() for node, _ in stack.next_functions]
    assert nodes == ["SumBackward0", "_NormalDivergenceBackward", "_LogUniformDivergenceBackward"]
    assert_close(ours, stock, rtol=1e-10, atol=0)
    assert_close(torch.autograd.grad(0.7 * ours, parameters), torch.autograd.grad(0.7 * stock, parameters))


def test_a_prior_that_was_written_to_is_read_anew():
    loc, scale = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    prior = Normal(loc, scale).expand(SHAPE).to_event(5)
    q = LogScaleNormal(tensor(*SHAPE), tensor(*SHAPE)).to_event(5)
    others = torch.full(SHAPE, 3.0, dtype=torch.float64)
    changes = (
        lambda: None,
        lambda: loc.fill_(2),
        lambda: scale.fill_(0.3),
        lambda: vars(prior.base_dist).update(loc=others),
    )
    for change in changes:
        change()
        assert_close(summed_divergence([(q, prior)]), kl_divergence(q, prior).sum(), rtol=1e-10, atol=0)
    with torch.inference_mode():
        prior = Normal(torch.zeros(SHAPE, dtype=torch.float64), 2.0).to_event(5)
        assert_close(summed_divergence([(q, prior)]), kl_divergence(q, prior).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["loc", "scale", "centre"])
def test_a_prior_that_is_trained_gets_its_gradient(name):
    torch.manual_seed(0)
    trained = tensor(*SHAPE).exp().requires_grad_()
    if name == "centre":
        prior = gaussian(trained, 1.0).to_event(2)
    else:
        arguments = {"loc": tensor(*SHAPE), "scale": tensor(*SHAPE).exp(), name: trained}
        prior = Normal(**arguments).to_event(5)
    q = LogScaleNormal(tensor(*SHAPE), tensor(*SHAPE)).to_event(5)
    divergences = summed_divergence([(q, prior)]), kl_divergence(q, prior).sum()
    assert_close(*(torch.autograd.grad(divergence, trained) for divergence in divergences))


def test_a_weight_of_zero_under_the_log_uniform_prior_stays_finite():
    loc = torch.zeros(3, requires_grad=True)
    log_scale = torch.full((3,), -2.0, requires_grad=True)
    total = summed_divergence([(LogScaleNormal(loc, log_scale).to_event(1), LogUniform().expand([3]).to_event(1))])
    total.backward()
    assert loc.grad is not None
    assert log_scale.grad is not None
    assert torch.isfinite(total)
    assert_close(loc.grad, torch.zeros(3))
    assert torch.isfinite(log_scale.grad).all()


def test_another_pair_takes_its_registered_divergence():
    q, p = Normal(tensor(4), tensor(4).exp()).to_event(1), Normal(tensor(4), tensor(4).exp()).to_event(1)
    assert_close(summed_divergence([(q, p)]), kl_divergence(q, p))


def test_a_sum_in_chunks_is_the_sum(monkeypatch):
    """Seven rows by three: the last chunk is short; parameters are those that every chunk shares."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_CHUNK", 3)
    layer = nn.Linear(4, 2).double()
    rows = tensor(7, 4).requires_grad_()
    seen: list[int] = []

    def function(part: Tensor) -> Tensor:
        return layer(part).sigmoid().square().sum()

    def value_and_gradients(part: Tensor) -> tuple[Tensor, ...]:
        seen.append(len(part))
        part = part.detach().requires_grad_()
        with torch.enable_grad():
            total = function(part)
        return total.detach(), *torch.autograd.grad(total, (part, *layer.parameters()))

    ours = chunked_sum(value_and_gradients, rows, layer.parameters())
    assert seen == [3, 3, 1]
    whole = function(rows)
    assert_close(ours, whole)
    wanted = [rows, *layer.parameters()]
    assert_close(torch.autograd.grad(-2.0 * ours, wanted), torch.autograd.grad(-2.0 * whole, wanted))


SCALES = [1e-12, 1e-6, 1.0, 1e6, 1e12]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 1e-40, 1e-30, -1e-12, 1.0, 1e12, 1e25])
def test_the_log_uniform_divergence_at_any_signal_to_noise(mean, dtype, zero):
    """Every scale that a guide can have, alone and beside a mean of 0; the slopes are those of eq. 14 in float64."""
    loc = torch.tensor([mean, *[0.0] * zero], dtype=dtype)
    for number in SCALES:
        log_scale = torch.full_like(loc, number).log()
        m, r = (each.clone().requires_grad_() for each in (loc, log_scale))
        total = summed_divergence([(LogScaleNormal(m, r), LogUniform().expand(loc.shape))])
        slopes = torch.autograd.grad(total, (m, r))
        t = 2 * (log_scale.double() - loc.double().abs().log())  # log α
        k1, k2, k3 = APPROXIMATION
        sigmoid = torch.sigmoid(-(k2 + k3 * t))
        most = torch.tensor(torch.finfo(dtype).max).double().log()
        value = k1 * sigmoid + 0.5 * nn.functional.softplus(-t.clamp(-most, most))
        assert_close(total.double(), value.sum(), rtol=1e-5, atol=1e-5)
        by_log_scale = -2 * k1 * k3 * sigmoid * (1 - sigmoid) - torch.sigmoid(-t)
        by_mean = torch.where(loc == 0, 0, -by_log_scale / loc.double())
        # Where α is beyond the numbers of the type, no slope is left: by m it was less than 1/s over the root of α.
        assert_close(slopes[0].double(), by_mean, rtol=2e-3, atol=1 / (number * torch.finfo(dtype).max ** 0.5))
        assert_close(slopes[1].double(), by_log_scale, rtol=2e-3, atol=2 / torch.finfo(dtype).max)


def test_a_mean_of_0_changes_nothing_for_other_weights_under_the_log_uniform_prior():
    """It brings limits with it, those that a GPU, which is not asked, always has."""
    torch.manual_seed(0)
    loc, log_scale = torch.randn(1000), (20 * torch.randn(1000)).clamp(-27, 27)
    gradients = []
    for zeros in (0, 1):
        parameters = [torch.cat([part, torch.zeros(zeros)]).requires_grad_() for part in (loc, log_scale)]
        total = summed_divergence([(LogScaleNormal(*parameters), LogUniform().expand([1000 + zeros]))])
        gradients.append([slope[:1000] for slope in torch.autograd.grad(total, parameters)])
    assert_close(*gradients)


@pytest.mark.parametrize(("count", "start"), [(20, 0), (7, 0), (7, 8), (9, 15), (2, 5)])
def test_changes_of_some_kernels_and_their_gradient(monkeypatch, count, start):
    """As by indexing in a circle of all: of a site all of them, none, one piece, or two."""
    kernels = [tensor(size, 2, 2).requires_grad_() for size in (3, 4, 6, 7)]
    means = [tensor(*site.shape) for site in kernels]
    monkeypatch.setattr(torch, "randint", lambda total, shape: torch.tensor(start))
    ours = kernel_changes(kernels, means, count)
    chosen = ((start + torch.arange(count)) % 20).sort().values
    stock = (torch.cat(kernels) - torch.cat(means))[chosen]
    assert torch.equal(ours, stock)
    weights = tensor(*ours.shape)
    found = torch.autograd.grad((ours * weights).sum(), kernels, allow_unused=True)
    for one, other in zip(found, torch.autograd.grad((stock * weights).sum(), kernels), strict=True):
        assert torch.equal(torch.zeros_like(other) if one is None else one, other)


@pytest.mark.parametrize("powers, tolerance", [((-12, -1), 2e-3), ((-1, 8), 1e-5)])
def test_the_log_uniform_gradient_in_float32(powers, tolerance):
    """Beside float64, from |m| ≪ s to |m| ≫ s."""
    signal = torch.logspace(*powers, 20_000, dtype=torch.float64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        loc = (signal.float() / 128).to(dtype).requires_grad_()  # s = 1/128, exactly
        log_scale = torch.full_like(loc, 1 / 128).log().requires_grad_()
        q = LogScaleNormal(loc, log_scale)
        divergence = summed_divergence([(q, LogUniform().expand(loc.shape))])
        gradients.append([each.double() for each in torch.autograd.grad(divergence, [loc, log_scale])])
    assert_close(*gradients, rtol=tolerance, atol=0)


def test_a_second_way_back_is_refused():
    """The first writes its result over what it needs, but for a factor of 1; nothing else would tell of a wrong one."""
    loc, log_scale = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    noise = torch.randn(3, 2)
    q = LogScaleNormal(loc, log_scale)
    alone, both = (log_scale_normals([loc], [log_scale], [noise])[0] for _ in range(2))
    sums = [
        alone.rsample().sum(),
        both.rsample().sum() + both.entropy().sum(),
        summed_divergence([(q, LogUniform().expand([3, 2]))]),
        chunked_sum(lambda rows: (rows.sum(), torch.ones_like(rows)), loc * 1),
    ]
    for total in sums:
        half = total / 2
        half.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace"):
            half.backward()
