"""The residual 3D U-Net of the deep-weight-prior papers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.models.ops.conv3d import Conv3d
from dwp_pyro.models.ops.instance_norm import InstanceNorm3d

__all__ = ["ResidualUNet3d"]

_DOWN_STRIDES = (2, 1, 2, 1, 2, 1)
_PAPER_DOWN_STRIDES = (*_DOWN_STRIDES, 1, 1, 1)

# Of the last leaky ReLU, as in MONAI's BasicUNet. With a ReLU, networks whose tumors are the voxels without a positive
# feature give all of them one probability, that of the output's biases (studies/pretrained).
_OUTPUT_SLOPE = 0.1


def _conv3x3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv3d:
    return Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _conv1x1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 1, stride=stride, bias=False)


class _ResidualBlock(nn.Module):
    """Pre-activation residual block: (InstanceNorm, ReLU, 3×3×3 convolution) twice, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, affine: bool) -> None:
        super().__init__()
        self.norm1 = InstanceNorm3d(in_channels, affine=affine)
        self.conv1 = _conv3x3x3(in_channels, out_channels, stride)
        self.norm2 = InstanceNorm3d(out_channels, affine=affine)
        self.conv2 = _conv3x3x3(out_channels, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv1x1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        output: Tensor = h + self.shortcut(x)
        return output


class _UpBlock(_ResidualBlock):
    """1×1×1 convolution, trilinear ×2, additive skip, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__(out_channels, out_channels, affine=affine)
        self.reduce = _conv1x1x1(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        # The skip's size is ×2, except for a side that the stride has rounded up.
        x = F.interpolate(self.reduce(x), size=skip.shape[2:], mode="trilinear", align_corners=False)
        return super().forward(x + skip)


class ResidualUNet3d(nn.Module):
    """Residual pre-activation U-Net for volumes, after Kuzina et al. 2019, section 4.

    A 3×3×3 input convolution; six down blocks of strides 2,1,2,1,2,1; three up blocks; InstanceNorm, leaky ReLU and a
    1×1×1 output. Instance norms have a learned scale and shift per channel, the output has a bias, and PyTorch's
    default initialization is used. With one input channel, two output channels and the default widths the network has
    2,346,450 parameters and 86,032 kernels of 3×3×3.

    `paper=True` builds the published network: nine down blocks of strides 2,1,2,1,2,1,1,1,1, no affine norms, a ReLU
    before the output, no output bias, and the initialization of He et al. 2015 with small output weights; 4,998,608
    parameters and 184,336 kernels. It hardly learns: Dice .00 / .00 / .00 on hippocampus / gliomas / MS lesions after
    400 steps on 5 cases, where nine down blocks with the default's other choices, but a ReLU before the output, reach
    .77 / .49 / .35 (one draw; studies/network). Six down blocks learn better than nine: Dice .495 against .469 on
    gliomas from a random initialization, mean of 8 draws.

    Args:
        in_channels: Number of input channels, one per modality.
        out_channels: Number of classes, background included.
        widths: Channels at full, half, quarter and eighth resolution.
        paper: Whether to build the published network.

    Raises:
        ValueError: If `widths` does not hold four positive numbers.

    Examples:
        >>> import torch
        >>> from dwp_pyro import ResidualUNet3d
        >>> network = ResidualUNet3d(1, 2, widths=(2, 3, 4, 5))
        >>> tuple(network(torch.zeros(1, 1, 16, 16, 16)).shape)
        (1, 2, 16, 16, 16)
    """

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...] = (16, 32, 64, 128), paper: bool = False
    ) -> None:
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths must be four positive numbers, one per resolution; got {widths}")
        affine = not paper
        self.input = _conv3x3x3(in_channels, widths[0])
        self._strides = _PAPER_DOWN_STRIDES if paper else _DOWN_STRIDES
        level = 0
        for number, stride in enumerate(self._strides, start=1):
            width = widths[level]
            if stride == 2:
                level += 1
            self.add_module(f"down{number}", _ResidualBlock(width, widths[level], stride, affine=affine))
        self.up1 = _UpBlock(widths[3], widths[2], affine=affine)
        self.up2 = _UpBlock(widths[2], widths[1], affine=affine)
        self.up3 = _UpBlock(widths[1], widths[0], affine=affine)
        self.norm = InstanceNorm3d(widths[0], affine=affine)
        self._output_slope = 0.0 if paper else _OUTPUT_SLOPE
        self.output = nn.Conv3d(widths[0], out_channels, 1, bias=not paper)
        if paper:
            for module in self.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            # Small logits avoid a saturated softmax, under which a pure Dice loss has no gradient.
            nn.init.normal_(self.output.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, out_channels, X, Y, Z] of images [B, in_channels, X, Y, Z], sides of at least 16 voxels."""
        h = self.input(x)
        skips: list[Tensor] = []
        for number, stride in enumerate(self._strides, start=1):
            if stride == 2:
                skips.append(h)
            h = self.get_submodule(f"down{number}")(h)
        for up in (self.up1, self.up2, self.up3):
            h = up(h, skips.pop())
        logits: Tensor = self.output(F.leaky_relu(self.norm(h), self._output_slope))
        return logits
