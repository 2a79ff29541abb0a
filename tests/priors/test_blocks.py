"""Prior blocks of any network, by the resolution of the kernels' inputs."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from torch import nn
from torch.nn import functional as F

from dwp_pyro.models.registry import NETWORKS, build_network
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import BLOCKS, kernel_sites, prior_blocks

WIDTHS = (8, 16, 32, 64)

# Kuzina et al. 2019: prefixes of the 3×3×3 kernels of each block.
PAPER = {
    "input": ("input", "down1.conv1"),
    "scale1": ("down1.conv2", "down2", "down3.conv1"),
    "scale2": ("down3.conv2", "down4", "down5.conv1"),
    "bottom": ("down5.conv2", "down6", "down7", "down8", "down9"),
    "up1": ("up1",),
    "up2": ("up2",),
    "up3": ("up3",),
}


@pytest.mark.parametrize("paper", [False, True])
def test_the_residual_unet_has_the_blocks_of_the_paper(paper):
    """The default lacks three down blocks of the bottom."""
    network = ResidualUNet3d(1, 2, (2, 3, 4, 5), paper=paper)
    blocks = prior_blocks(network)
    assert list(blocks) == list(kernel_sites(network))
    assert len(blocks) == (25 if paper else 19)
    for site, block in blocks.items():
        assert any(site.startswith(f"{prefix}.") for prefix in PAPER[block])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_all_blocks(name):
    network = build_network(name, 4, 3, WIDTHS)
    blocks = prior_blocks(network)
    assert list(blocks) == list(kernel_sites(network))
    assert set(blocks.values()) == set(BLOCKS)
    before = [p.detach().clone() for p in network.parameters()]
    prior_blocks(network)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(p.device.type == "cpu" for p in network.parameters())


def test_places_of_segresnet_by_hand():
    blocks = prior_blocks(SegResNet(3, 8, 2, 2))
    assert blocks["convInit.conv.weight"] == "input"
    assert blocks["down_layers.1.0.conv.weight"] == "input"  # a strided convolution has the higher resolution as input
    assert blocks["down_layers.1.1.conv1.conv.weight"] == "scale1"
    assert blocks["down_layers.3.1.conv1.conv.weight"] == "bottom"
    assert blocks["up_layers.0.0.conv1.conv.weight"] == "up1"
    assert blocks["up_layers.2.0.conv2.conv.weight"] == "up3"


@pytest.mark.parametrize(
    "network",
    [
        UNet(2, 3, 2, WIDTHS, (2, 2, 2), num_res_units=2),
        SegResNet(2, 8, 3, 2),
        DynUNet(2, 3, 2, (3, 3, 3), (1, 2, 2), (2, 2)),
        BasicUNet(2, 3, 2, (8, 8, 8, 8, 8, 8)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_two_dimensions(network):
    blocks = prior_blocks(network)
    assert list(blocks) == list(kernel_sites(network))
    assert {"input", "bottom", "up3"} <= set(blocks.values())


def test_a_network_of_five_levels_has_the_lower_ones_at_the_bottom():
    """Resolutions 1, 1/2, 1/4, 1/8, 1/16 down and up: all below a quarter are the bottom."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(nn.Conv3d(1, 1, 3, padding=1) for _ in range(5))
            self.up = nn.ModuleList(nn.Conv3d(1, 1, 3, padding=1) for _ in range(4))

        def forward(self, x):
            for conv in self.down[:-1]:
                x = F.max_pool3d(conv(x), 2)
            x = self.down[-1](x)
            for conv in self.up:
                x = conv(F.interpolate(x, scale_factor=2))
            return x

    expected = ["input", "scale1", "scale2", "bottom", "bottom", "bottom", "up1", "up2", "up3"]
    assert list(prior_blocks(Deep()).values()) == expected


def test_a_network_of_one_resolution_is_all_input():
    network = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3, padding=1), nn.Conv3d(2, 1, 1))
    assert prior_blocks(network) == {"0.weight": "input", "2.weight": "input"}


def test_unsupported_networks_raise():
    with pytest.raises(ValueError, match="no convolution kernel"):
        prior_blocks(nn.Sequential(nn.Conv3d(1, 1, 1)))
    with pytest.raises(ValueError, match="64 voxels per side"):
        prior_blocks(nn.Sequential(nn.Conv3d(1, 1, 3), nn.Flatten(), nn.Linear(5, 5)))


def test_kernel_sites_exclude_pointwise_convolutions():
    """Sites have the parameter's name, for convolutions in one, two and three dimensions."""
    network = nn.ModuleDict(
        {"a": nn.Conv1d(1, 2, 3), "b": nn.Conv2d(1, 2, (1, 3)), "c": nn.Conv3d(1, 2, 1), "d": nn.Linear(3, 3)}
    )
    sites = kernel_sites(network)
    assert list(sites) == ["a.weight", "b.weight"]
    assert sites["a.weight"] is network["a"].weight
