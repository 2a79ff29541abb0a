"""`ResidualUNet3d`: parameters of both variants, blocks, and volumes of any size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dwp_pyro.models.ops.instance_norm import InstanceNorm3d
from dwp_pyro.models.registry import build_network
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import kernel_sites

WIDTHS = (2, 3, 4, 5)


def test_the_published_network_has_the_parameters_of_the_paper():
    """4,998,608 parameters; 184,336 kernels of 3×3×3; without biases or affine norms."""
    network = build_network("paper-unet", 1, 2, (16, 32, 64, 128))
    assert sum(p.numel() for p in network.parameters()) == 4_998_608
    sites = kernel_sites(network)
    assert all(weight.shape[2:] == (3, 3, 3) for weight in sites.values())
    assert sum(weight.shape[:2].numel() for weight in sites.values()) == 184_336
    assert all(name.endswith(".weight") and p.dim() == 5 for name, p in network.named_parameters())
    others = {name: p for name, p in network.named_parameters() if name not in sites}
    assert all(p.shape[2:] == (1, 1, 1) for p in others.values())
    assert set(others) == {
        *(f"down{i}.shortcut.weight" for i in (1, 3, 5)),
        *(f"up{i}.reduce.weight" for i in (1, 2, 3)),
        "output.weight",
    }


def test_the_numbers_of_the_default():
    """2,346,450 parameters; 86,032 kernels of 3×3×3 at 19 sites."""
    network = build_network("residual-unet", 1, 2, (16, 32, 64, 128))
    assert sum(p.numel() for p in network.parameters()) == 2_346_450
    sites = kernel_sites(network)
    assert all(weight.shape[2:] == (3, 3, 3) for weight in sites.values())
    assert len(sites) == 19
    assert sum(weight.shape[:2].numel() for weight in sites.values()) == 86_032


def test_the_default_adds_affine_norms_and_an_output_bias_and_lacks_three_down_blocks():
    """Its kernels, and so the sites of a prior, are those of the published network without these blocks."""
    ours, papers = (ResidualUNet3d(1, 2, WIDTHS, paper=paper) for paper in (False, True))
    added = dict(ours.named_parameters()).keys() - dict(papers.named_parameters()).keys()
    norms = [name for name, module in ours.named_modules() if isinstance(module, InstanceNorm3d)]
    assert added == {f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias")} | {"output.bias"}
    lacking = dict(papers.named_parameters()).keys() - dict(ours.named_parameters()).keys()
    assert lacking == {f"down{i}.conv{j}.weight" for i in (7, 8, 9) for j in (1, 2)}
    assert kernel_sites(ours).keys() == kernel_sites(papers).keys() - lacking


@pytest.mark.parametrize("paper", [False, True])
def test_strides_of_the_down_blocks(paper):
    """2,1,2,1,2,1, for the published network 2,1,2,1,2,1,1,1,1: half, quarter and eighth resolution."""
    network = ResidualUNet3d(1, 2, WIDTHS, paper=paper)
    sides = []
    for name in (name for name, _ in network.named_children() if name.startswith("down")):
        network.get_submodule(name).register_forward_hook(lambda module, args, output: sides.append(output.shape[2]))
    network(torch.randn(1, 1, 16, 16, 16))
    assert sides == [8, 8, 4, 4, 2, 2, *([2, 2, 2] if paper else [])]


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("size", [(16, 16, 16), (17, 19, 22)])
@pytest.mark.parametrize(("in_channels", "out_channels", "widths"), [(1, 2, WIDTHS), (4, 3, (3, 2, 4, 2))])
def test_logits_have_the_size_of_the_image(paper, size, in_channels, out_channels, widths):
    network = ResidualUNet3d(in_channels, out_channels, widths, paper=paper)
    assert network(torch.randn(2, in_channels, *size)).shape == (2, out_channels, *size)


def test_cases_of_a_batch_do_not_mix():
    """Instance norms have no running statistics: cases are independent in training and evaluation mode."""
    network = ResidualUNet3d(1, 2, WIDTHS).double()
    image = torch.randn(2, 1, 16, 16, 16, dtype=torch.double)
    together = network(image)
    assert_close(network(image[1:]), together[1:])
    assert_close(network.eval()(image), together)


def test_a_residual_block_is_pre_activated():
    """x + conv(ReLU(norm(conv(ReLU(norm(x))))))."""
    block = ResidualUNet3d(1, 2, WIDTHS).double().get_submodule("down2")
    x = torch.randn(1, 3, 4, 4, 4, dtype=torch.double)
    h = F.conv3d(F.relu(F.instance_norm(x)), block.conv1.weight, padding=1)
    h = F.conv3d(F.relu(F.instance_norm(h)), block.conv2.weight, padding=1)
    assert_close(block(x), x + h)


def test_the_skips_join_equal_resolutions():
    """Each up block adds the last features before a stride: up1 down4, up2 down2, up3 the input's."""
    network = ResidualUNet3d(1, 2, WIDTHS)
    produced, joined = {}, {}
    for name in ("input", "down2", "down4"):
        network.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: produced.update({name: out}))
    for name in ("up1", "up2", "up3"):
        network.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: joined.update({name: args[1]})
        )
    network(torch.randn(1, 1, 16, 16, 16))
    assert joined["up1"] is produced["down4"]
    assert joined["up2"] is produced["down2"]
    assert joined["up3"] is produced["input"]


@pytest.mark.parametrize(("paper", "slope"), [(False, 0.1), (True, 0.0)])
def test_the_output_layer_sees_normalized_features(paper, slope):
    """The last up block's residual stream is normalized and rectified per channel, whatever its scale."""
    network = ResidualUNet3d(1, 2, WIDTHS, paper=paper).double()
    seen = {}
    network.up3.register_forward_hook(lambda module, args, out: seen.update(stream=out))
    network.output.register_forward_hook(lambda module, args, out: seen.update(features=args[0], logits=out))
    image = torch.randn(2, 1, 16, 16, 16, dtype=torch.double)
    logits = network(image)
    mean, variance = (seen["stream"].mean((2, 3, 4), keepdim=True), seen["stream"].var((2, 3, 4), False, keepdim=True))
    normalized = (seen["stream"] - mean) / (variance + 1e-5).sqrt()
    assert_close(seen["features"], torch.where(normalized > 0, normalized, slope * normalized))
    assert seen["logits"] is logits
    with torch.no_grad():
        for weight in (network.input.weight, network.up3.reduce.weight, network.up3.conv2.weight):
            weight *= 100.0
    assert_close(network(image).std((2, 3, 4)), logits.std((2, 3, 4)), rtol=10, atol=0)


def test_voxels_without_a_positive_feature_differ_in_their_logits():
    network = ResidualUNet3d(1, 2, WIDTHS)
    torch.nn.init.constant_(network.norm.bias, -10.0)
    assert network(torch.randn(1, 1, 16, 16, 16)).std((2, 3, 4)).min() > 1e-3


def test_every_parameter_receives_a_gradient():
    network = ResidualUNet3d(2, 3, WIDTHS)
    network(torch.randn(1, 2, 16, 16, 16)).square().sum().backward()
    assert all((p.grad != 0).any() for p in network.parameters())


@pytest.mark.parametrize("widths", [(16, 32, 64), (1, 2, 3, 4, 5), (2, 2, 0, 2), ()])
def test_wrong_widths_raise(widths):
    with pytest.raises(ValueError, match="four positive numbers"):
        ResidualUNet3d(1, 2, widths)
