"""A 3D convolution that is fast for small volumes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Conv3d"]

# PyTorch uses oneDNN for a single volume only above this channels × depth × height
# (aten/src/ATen/native/Convolution.cpp).
_SLOW_UP_TO = 20480


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d`, up to ten times faster on a CPU for one small volume, and equal up to rounding.

    PyTorch convolves a batch of one small float32 volume without oneDNN, and every batch of two with it. Such a volume
    is convolved as two halves along its depth, which share the rows at the cut.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._is_slow(input):
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        outputs = (input.shape[2] + 2 * padding - kernel) // stride + 1
        half = (outputs + 1) // 2
        rows, start = (half - 1) * stride + kernel, (outputs - half) * stride
        padded = F.pad(input, (0, 0, 0, 0, padding, padding))
        halves = torch.cat([padded[:, :, :rows], padded[:, :, start : start + rows]])
        first, second = F.conv3d(halves, weight, bias, self.stride, (0, *self.padding[1:])).split(1)
        return torch.cat([first, second[:, :, 2 * half - outputs :]], 2)

    def _is_slow(self, input: Tensor) -> bool:
        return (
            input.device.type == "cpu"
            and input.dtype == torch.float32
            and input.dim() == 5
            and len(input) == 1
            and input.shape[1] * input.shape[2] * input.shape[3] <= _SLOW_UP_TO
            and not torch.is_autocast_enabled("cpu")
            and max(self.kernel_size) > 1
            and self.groups == 1
            and self.dilation == (1, 1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )
