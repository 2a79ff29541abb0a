"""The instance norm of a GPU, which any device can compute, against PyTorch's."""

import pytest
import torch
from torch import nn

from dwp_pyro.models.instance_norm import InstanceNorm3d, _Normalise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_pytorch_s(dtype):
    """Far from 0, where a mean of squares would lose all digits; in bfloat16 as near as its rounding allows."""
    x = (1000 * torch.arange(1, 4, dtype=torch.float64)[:, None, None, None] + torch.randn(2, 3, 5, 6, 7)).to(dtype)
    x.requires_grad_()
    expected = nn.InstanceNorm3d(3)(x.double())
    weights = torch.randn_like(x)
    (slope,) = torch.autograd.grad((expected * weights).sum(), x)
    y = _Normalise.apply(x, 1e-5)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(found.double(), slope.double(), atol=tolerance, rtol=10 * tolerance)


def test_its_gradient_is_that_of_finite_differences():
    x = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Normalise.apply(x, 1e-5), x)


def test_on_a_cpu_it_is_pytorch_s_own():
    """Of one volume without a batch, too."""
    x = torch.randn(1, 4, 6, 6, 6)
    for volume in (x, x[0]):
        assert torch.equal(InstanceNorm3d(4)(volume), nn.InstanceNorm3d(4)(volume))
    assert not list(InstanceNorm3d(4).parameters())
