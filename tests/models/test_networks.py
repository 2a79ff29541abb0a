"""Networks by name: what the commands need of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dwp_pyro.config import NETWORKS as NAMES
from dwp_pyro.models.convolution import Conv3d
from dwp_pyro.models.networks import NETWORKS, build_network

WIDTHS = (8, 16, 32, 64)


def test_the_command_line_lists_them_all():
    assert tuple(NETWORKS) == NAMES


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_patch_passes_whole(name):
    """Sides of twice the stride; as many logits as voxels, of as many channels as asked for."""
    side = 2 * NETWORKS[name].stride
    logits = build_network(name, 4, 3, WIDTHS)(torch.randn(1, 4, side, side, 2 * side))
    assert logits.shape == (1, 3, side, side, 2 * side)


@pytest.mark.parametrize("name", NETWORKS)
def test_first_and_last_block_are_a_part_of_the_parameters(name):
    network = build_network(name, 1, 2, WIDTHS)
    names = [name for name, _ in network.named_parameters()]
    for prefix in NETWORKS[name].ends:
        assert any(parameter.startswith(prefix) for parameter in names)
    ends = [parameter for parameter in names if parameter.startswith(NETWORKS[name].ends)]
    assert 0 < len(ends) < len(names)


@pytest.mark.parametrize("name", NETWORKS)
def test_quick_convolutions_change_nothing(name):
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
