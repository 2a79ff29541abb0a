"""The instance norm for GPUs, computed on a CPU, against PyTorch's."""

import pytest
import torch
from torch import nn

from dwp_pyro.models.ops.instance_norm import InstanceNorm3d, _instance_norm, _Normalize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_equals_pytorch(dtype):
    """Values far from 0, where a mean of squares loses all digits; bfloat16 agrees to its rounding."""
    x = (1000 * torch.arange(1, 4, dtype=torch.float64)[:, None, None, None] + torch.randn(2, 3, 5, 6, 7)).to(dtype)
    x.requires_grad_()
    expected = nn.InstanceNorm3d(3)(x.double())
    weights = torch.randn_like(x)
    (slope,) = torch.autograd.grad((expected * weights).sum(), x)
    y = _Normalize.apply(x, 1e-5)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(found.double(), slope.double(), atol=tolerance, rtol=10 * tolerance)


def test_its_gradient_matches_finite_differences():
    x = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Normalize.apply(x, 1e-5), x)


def test_scale_and_shift_equal_pytorch():
    """Values and gradients."""
    norm = nn.InstanceNorm3d(3, affine=True, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, norm.weight, norm.bias)
    ours, theirs = _instance_norm(x, norm.weight, norm.bias, norm.eps), norm(x)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_on_a_cpu_it_uses_pytorch():
    """Also for one volume without a batch."""
    x = torch.randn(1, 4, 6, 6, 6)
    for volume in (x, x[0]):
        for affine in (False, True):
            assert torch.equal(InstanceNorm3d(4, affine=affine)(volume), nn.InstanceNorm3d(4, affine=affine)(volume))
    assert not list(InstanceNorm3d(4).parameters())
