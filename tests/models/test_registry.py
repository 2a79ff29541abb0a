"""Networks by name: the properties that the commands rely on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dwp_pyro.config.training import NETWORK_NAMES
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.models.ops.conv3d import Conv3d
from dwp_pyro.models.registry import NETWORKS, build_network
from dwp_pyro.priors.blocks import kernel_sites

WIDTHS = (8, 16, 32, 64)


def test_the_command_line_lists_them_all():
    assert tuple(NETWORKS) == NETWORK_NAMES


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_patch_passes_whole(name):
    """Sides of twice the stride; logits have the image's size and the requested channels."""
    side = 2 * NETWORKS[name].stride
    logits = build_network(name, 4, 3, WIDTHS)(torch.randn(1, 4, side, side, 2 * side))
    assert logits.shape == (1, 3, side, side, 2 * side)


@pytest.mark.parametrize("name", NETWORKS)
def test_first_and_last_block_are_a_part_of_the_parameters(name):
    network = build_network(name, 1, 2, WIDTHS)
    names = [name for name, _ in network.named_parameters()]
    for prefix in NETWORKS[name].first_last:
        assert any(parameter.startswith(prefix) for parameter in names)
    ends = [parameter for parameter in names if parameter.startswith(NETWORKS[name].first_last)]
    assert 0 < len(ends) < len(names)


@pytest.mark.parametrize("name", NETWORKS)
def test_fast_convolutions_change_nothing(name):
    torch.manual_seed(0)
    network = build_network(name, 1, 2, WIDTHS)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        quick = network(image)
        swapped = [m for m in network.modules() if type(m) is Conv3d]
        assert swapped
        for module in swapped:
            module.__class__ = nn.Conv3d
        assert_close(network(image), quick, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_posterior_of_any_network_survives_its_file(name, tmp_path):
    """Its logits are those of the network with the drawn kernels."""
    network_config = NetworkConfig(
        ("flair",), ("lesion",), ((1,),), "openms", None, (32, 32, 32), network=name, widths=(8, 16, 32, 64)
    )
    network = network_config.build()
    kernels = {site: kernel.detach() for site, kernel in kernel_sites(network).items()}
    posterior = Posterior(network_config, [Member(network, MeanFieldNormal(kernels, 0.1))])
    posterior.save(tmp_path / "p.safetensors")
    drawn = posterior.draw(3)
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        logits = posterior.logits(image, drawn)
        loaded = Posterior.load(tmp_path / "p.safetensors")
        assert_close(loaded.logits(image, loaded.draw(3)), logits)
        for site in kernels:
            network.get_parameter(site).copy_(drawn[site])
        assert_close(network(image), logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_kernel_depends_on_the_regions(name):
    """A prior and a source network serve any number of regions: only the output layer differs."""
    one, three = (build_network(name, 1, 1 + regions, WIDTHS) for regions in (1, 3))
    assert {s: w.shape for s, w in kernel_sites(one).items()} == {s: w.shape for s, w in kernel_sites(three).items()}
    pairs = ((p.shape, q.shape) for p, q in zip(one.parameters(), three.parameters(), strict=True))
    differ = [(p, q) for p, q in pairs if p != q]
    assert 1 <= len(differ) <= 2 and all((p[0], q[0]) == (2, 4) and p[1:] == q[1:] for p, q in differ)
