"""`Conv3d` against PyTorch's convolution."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from dwp_pyro.models.ops.conv3d import Conv3d


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """Record the batch sizes that reach PyTorch's convolution."""
    seen: list[int] = []
    convolve = F.conv3d

    def spy(input, *args):
        seen.append(len(input))
        return convolve(input, *args)

    monkeypatch.setattr(F, "conv3d", spy)
    return seen


def assert_same_as_pytorch(ours: Conv3d, image: torch.Tensor) -> torch.Tensor:
    """Compare values and gradients with PyTorch's in double precision; return the output."""
    stock = nn.Conv3d(
        ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, ours.padding,
        groups=ours.groups, bias=ours.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    stock.load_state_dict(ours.state_dict())
    inputs = image.clone().requires_grad_(), image.double().requires_grad_()
    results = ours(inputs[0]), stock(inputs[1])
    assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(results[0])
    (results[0] * weights).sum().backward()
    (results[1] * weights.double()).sum().backward()
    pairs = [(inputs[0], inputs[1]), *zip(ours.parameters(), stock.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)
    return results[0]


@pytest.mark.parametrize("outputs", [1, 2, 7, 8])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 1), 3])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), ((5, 1, 3), (2, 0, 1)), (2, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_small_volumes_have_the_values_and_gradients_of_pytorch(batches, outputs, stride, kernel, padding, bias):
    """`outputs` along the depth for stride 1."""
    torch.manual_seed(0)
    ours = Conv3d(2, 3, kernel, stride=stride, padding=padding, bias=bias)
    depth = outputs - 1 + ours.kernel_size[0] - 2 * ours.padding[0]
    assert_same_as_pytorch(ours, torch.randn(1, 2, depth, 6, 9))
    assert batches[0] == 2


@pytest.mark.parametrize(("kernel", "padding"), [(5, 2), (3, 0), ((5, 3, 4), (2, 0, 1)), (7, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_values_and_gradients_are_those_of_pytorch(kernel, padding, bias):
    torch.manual_seed(0)
    ours = Conv3d(6, 6, kernel, padding=padding, groups=6, bias=bias)
    output = assert_same_as_pytorch(ours, torch.randn(2, 6, 7, 8, 9))
    assert "Depthwise" in str(output.grad_fn) or bias


def test_depthwise_layers_can_be_traced_and_mapped():
    layer, image = Conv3d(2, 2, 3, padding=1, groups=2), torch.randn(1, 2, 4, 4, 4)
    stock = nn.Conv3d(2, 2, 3, padding=1, groups=2)
    assert_close(torch.jit.trace(layer, image)(image), layer(image))
    images = torch.randn(3, 1, 2, 4, 4, 4)

    def loss(network: nn.Module, weight: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(network, {"weight": weight, "bias": layer.bias.detach()}, (image,))
        return output.square().sum()

    weight = layer.weight.detach()
    mapped = torch.func.vmap(torch.func.grad(partial(loss, layer)), (None, 0))(weight, images)
    each = [torch.func.grad(partial(loss, stock))(weight, image) for image in images]
    assert_close(mapped, torch.stack(each), rtol=1e-4, atol=1e-4)


def test_depthwise_gradients_are_computed_only_where_they_are_needed(monkeypatch):
    layer = Conv3d(2, 2, 3, padding=1, groups=2, bias=False).requires_grad_(False)
    image = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    monkeypatch.setattr(torch.fft, "rfftn", None)  # of the gradient of the kernel
    layer(image).sum().backward()
    assert image.grad is not None


@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (Conv3d(1, 1, 3, padding=1), torch.zeros(2, 1, 8, 8, 8)),
        (Conv3d(1, 1, 3, padding=1), torch.zeros(1, 8, 8, 8)),
        (Conv3d(1, 1, 1), torch.zeros(1, 1, 8, 8, 8)),
        (Conv3d(1, 1, 3, padding=1).double(), torch.zeros(1, 1, 8, 8, 8).double()),
        (Conv3d(1, 1, 3, padding="same"), torch.zeros(1, 1, 8, 8, 8)),
        (Conv3d(1, 1, 3, padding=1, padding_mode="circular"), torch.zeros(1, 1, 8, 8, 8)),
        (Conv3d(1, 1, 3, dilation=2), torch.zeros(1, 1, 8, 8, 8)),
        (Conv3d(2, 4, 3, groups=2), torch.zeros(1, 2, 8, 8, 8)),
        (Conv3d(2, 2, 3, padding=3, groups=2), torch.zeros(1, 2, 8, 8, 8)),
        (Conv3d(1, 1, 3, padding=1), torch.zeros(1, 1, 144, 144, 1)),
    ],
    ids=["a batch", "no batch", "1×1×1", "float64", "same", "circular", "dilated", "grouped", "wide margin", "large"],
)
def test_other_inputs_use_pytorch(batches, layer, image):
    layer(image)
    assert batches == [len(image)] or image.dim() == 4 or layer.padding_mode == "circular"
    assert 2 not in batches or len(image) == 2
