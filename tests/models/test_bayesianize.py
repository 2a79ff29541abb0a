"""`bayesianize` changes the source of the kernels and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from pyro import poutine
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.testing import assert_close

from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import BLOCKS, kernel_sites, prior_blocks
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior


def make_bayesian(network: nn.Module) -> dict[str, Tensor]:
    return bayesianize(network, {site: make_prior("normal", site, w) for site, w in kernel_sites(network).items()})


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, bias=False)), nn.Conv2d(2, 1, 1)
    )


def latent_sites(model: nn.Module, *args: Tensor) -> list[str]:
    trace = poutine.trace(model).get_trace(*args)
    return list(trace.stochastic_nodes)


def test_conditioned_on_its_old_weights_it_is_the_plain_network():
    """The same weights give the same logits; the weights are returned under their parameter names."""
    plain = ResidualUNet3d(1, 2, (2, 3, 4, 5))
    network = copy.deepcopy(plain)
    weights = make_bayesian(network)
    assert weights.keys() == kernel_sites(plain).keys()
    for site, weight in weights.items():
        assert_close(weight, plain.get_parameter(site), rtol=0, atol=0)
        assert not weight.requires_grad
    image = torch.randn(1, 1, 16, 17, 16)
    with torch.no_grad():
        assert_close(poutine.condition(network, weights)(image), plain(image))


def test_a_conditioned_plain_convolution_keeps_stride_padding_and_bias():
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect", dilation=1))
    network = copy.deepcopy(plain)
    weights = make_bayesian(network)
    image = torch.randn(2, 2, 7, 7)
    assert_close(poutine.condition(network, weights)(image), plain(image))
    assert [name for name, _ in network.named_parameters()] == ["0.bias"]


def test_only_the_named_weights_become_sites():
    """They are sampled from their priors at every call; the others stay parameters."""
    network = small()
    first = nn.init.constant_(network[0].weight, 5.0)
    bayesianize(network, {"1.1.weight": Normal(torch.full((2, 2, 3, 3), 7.0), 1e-6).to_event(4)})
    trace = poutine.trace(network).get_trace(torch.randn(1, 1, 8, 8))
    assert trace.stochastic_nodes == ["1.1.weight"]
    assert_close(trace.nodes["1.1.weight"]["value"], torch.full((2, 2, 3, 3), 7.0))
    assert trace.nodes["1.1.weight"]["scale"] == 1.0
    assert network[0].weight is first
    assert [name for name, _ in network.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert set(trace.param_nodes) == {"0.weight", "0.bias", "2.weight", "2.bias"}


class Wrapper(nn.Module):
    """A module with the network as a child, like `SegmentationModel`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class PyroWrapper(PyroModule):
    """The same as a `PyroModule`, which adds its prefix to the children's sites."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize(
    "wrap",
    [lambda network: network, Wrapper, nn.Sequential, lambda network: Wrapper(Wrapper(network))],
    ids=["bare", "module", "sequential", "twice"],
)
def test_sites_keep_their_names_in_an_enclosing_module(wrap):
    network = small()
    make_bayesian(network)
    assert latent_sites(wrap(network), torch.randn(1, 1, 8, 8)) == ["0.weight", "1.1.weight"]


def test_an_enclosing_pyro_module_adds_its_prefix():
    network = small()
    make_bayesian(network)
    assert latent_sites(PyroWrapper(network), torch.randn(1, 1, 8, 8)) == ["network.0.weight", "network.1.1.weight"]


def test_a_single_convolution_is_a_network_too():
    convolution = nn.Conv1d(1, 2, 3)
    make_bayesian(convolution)
    assert latent_sites(convolution, torch.randn(1, 1, 8)) == ["weight"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_handlers_reach_a_copy(clone):
    """A copy without the convolution's effect would silently ignore local reparameterization."""
    network = small()
    make_bayesian(network)
    asked: list[str] = []

    def posterior(site: str) -> tuple[Tensor, Tensor]:
        asked.append(site)
        return torch.zeros(2, 1 if site == "0.weight" else 2, 3, 3), torch.tensor(1.0).expand(2, 1, 3, 3)

    with LocalReparameterization(posterior):
        clone(network[0])(torch.randn(1, 1, 8, 8))
    assert asked == ["0.weight"]


@pytest.mark.parametrize("site", ["0.bias", "1.0.weight", "9.weight", "weight", "1", "", "0.weight.weight"])
def test_a_name_that_is_no_convolution_raises_and_changes_nothing(site):
    network = small()
    good = make_prior("normal", "0.weight", network[0].weight)
    with pytest.raises(ValueError, match="is not the weight of a convolution"):
        bayesianize(network, {"0.weight": good, site: good})
    assert type(network) is nn.Sequential
    assert isinstance(network[0].weight, nn.Parameter)


def test_twice_raises():
    network = small()
    make_bayesian(network)
    with pytest.raises(ValueError, match="is not the weight of a convolution"):
        bayesianize(network, {"0.weight": Normal(torch.zeros(2, 1, 3, 3), 1.0).to_event(4)})


@pytest.mark.parametrize(
    "prior",
    [
        Normal(torch.zeros(2, 1, 3, 3), 1.0),
        Normal(torch.zeros(2, 1, 3, 3), 1.0).to_event(2),
        Normal(torch.zeros(1, 2, 3, 3), 1.0).to_event(4),
        Normal(torch.zeros(5, 2, 1, 3, 3), 1.0).to_event(4),
    ],
    ids=["no event", "kernels as event", "transposed", "a batch"],
)
def test_a_prior_of_another_shape_raises(prior):
    with pytest.raises(ValueError, match=r"'0.weight' has the shape \(2, 1, 3, 3\)"):
        bayesianize(small(), {"0.weight": prior})


def learned_prior(kernel_shape: tuple[int, ...]) -> KernelPrior:
    """Return a prior fitted to another network, with other site names."""
    block_infos = {block: BlockInfo((f"{block}.weight",), 0) for block in BLOCKS}
    prior = KernelPrior("dwp", {block: KernelVAE(kernel_shape, 2, (4,)) for block in BLOCKS}, block_infos)
    return prior.requires_grad_(False)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda d: UNet(d, 2, 2, (8, 8, 8), (2, 2), num_res_units=1),
        lambda d: SegResNet(d, 8, 2, 2),
        lambda d: DynUNet(d, 2, 2, (3, 3, 3), (1, 2, 2), (2, 2), (4, 4, 4)),
        lambda d: BasicUNet(d, 2, 2, (4, 4, 4, 4, 4, 4)),
    ],
    ids=["UNet", "SegResNet", "DynUNet", "BasicUNet"],
)
def test_networks_of_monai_take_a_learned_prior(make, dimensions):
    """Every spatial kernel is a site under the density of its block; a step of SVI moves all means."""
    network, prior = make(dimensions), learned_prior((3,) * dimensions)
    sites, blocks = kernel_sites(network), prior_blocks(network)
    kernels = bayesianize(network, prior)
    assert kernels.keys() == sites.keys()
    guide = MeanFieldNormal(kernels)
    image = torch.randn(2, 2, *[32] * dimensions)  # PyTorch convolves a single volume slowly
    trace = poutine.trace(network).get_trace(image)
    for site, block in blocks.items():
        base = trace.nodes[site]["fn"].base_dist
        assert isinstance(base, DeepWeightPrior) and base.density is prior.block(block)
    with poutine.replay(trace=poutine.trace(guide).get_trace(image)):
        network(image).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in guide.parameters())


def test_a_name_is_a_prior_for_every_kernel():
    network = small()
    assert list(bayesianize(network, "normal")) == ["0.weight", "1.1.weight"]
    assert latent_sites(network, torch.randn(1, 1, 8, 8)) == ["0.weight", "1.1.weight"]
