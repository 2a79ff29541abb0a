"""The residual 3D U-Net of the deep-weight-prior papers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.models.convolution import Conv3d
from dwp_pyro.models.instance_norm import InstanceNorm3d

__all__ = ["ResidualUNet3d"]

_DOWN_STRIDES = (2, 1, 2, 1, 2, 1)
_PAPER_DOWN_STRIDES = (*_DOWN_STRIDES, 1, 1, 1)


def _conv3x3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv3d:
    return Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _conv1x1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 1, stride=stride, bias=False)


class _ResidualBlock(nn.Module):
    """Pre-activation residual block: (InstanceNorm, ReLU, 3×3×3 convolution) twice, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, affine: bool) -> None:
        super().__init__()
        self.norm1 = InstanceNorm3d(in_channels, affine)
        self.conv1 = _conv3x3x3(in_channels, out_channels, stride)
        self.norm2 = InstanceNorm3d(out_channels, affine)
        self.conv2 = _conv3x3x3(out_channels, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv1x1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        return h + self.shortcut(x)


class _UpBlock(_ResidualBlock):
    """1×1×1 convolution, trilinear ×2, additive skip, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__(out_channels, out_channels, affine=affine)
        self.reduce = _conv1x1x1(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        # To the skip's own size: ×2, but for a side that the stride had rounded up.
        x = F.interpolate(self.reduce(x), size=skip.shape[2:], mode="trilinear", align_corners=False)
        return super().forward(x + skip)


class ResidualUNet3d(nn.Module):
    """Residual pre-activation U-Net for volumes, after Kuzina et al. 2019, section 4.

    A 3×3×3 input convolution; six down blocks of strides 2,1,2,1,2,1; three up blocks; InstanceNorm, ReLU and a 1×1×1
    output. Instance norms have a learned scale and shift per channel, the output has a bias, and weights start as
    PyTorch's do. With one input channel, two output channels and the default widths the network has 2,346,450
    parameters and 86,032 kernels of 3×3×3.

    `paper=True` is the published form: nine down blocks of strides 2,1,2,1,2,1,1,1,1, no affine norms, no output bias,
    and the start of He et al. 2015 with an output near 0; 4,998,608 parameters and 184,336 kernels. It hardly learns.

    Six down blocks learn better than nine, and faster: Dice .495 against .469 on gliomas from a random start, mean of
    8 draws. What each other ingredient is worth, measured on the form with nine down blocks, Dice after 400 steps on
    5 cases, hippocampus / gliomas / MS lesions, one draw (docs/results.md): PyTorch's start .77 / .49 / .35; the start
    of He et al. .77 / .45 / .22, then without affine norms .76 / .46 / .22, without the output bias .76 / .49 / .23,
    without the final norm .75 / .45 / .00, with output weights of .01 .00 / .31 / .00; the published form
    .00 / .00 / .00.

    Args:
        in_channels: Input channels, one per modality.
        out_channels: Classes, background included.
        widths: Channels at full, half, quarter and eighth resolution.
        paper: Whether to build the published form.

    Raises:
        ValueError: if `widths` does not hold four positive numbers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...] = (16, 32, 64, 128),
        paper: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths must be four positive numbers, one a resolution; got {widths}")
        affine = not paper
        self.input = _conv3x3x3(in_channels, widths[0])
        strides = _PAPER_DOWN_STRIDES if paper else _DOWN_STRIDES
        level = 0
        self._skips: list[str] = []
        self._downs: list[str] = []
        for i, stride in enumerate(strides, start=1):
            if stride == 2:
                self._skips.append(self._downs[-1] if self._downs else "input")
                block = _ResidualBlock(widths[level], widths[level + 1], stride, affine=affine)
                level += 1
            else:
                block = _ResidualBlock(widths[level], widths[level], affine=affine)
            self._downs.append(f"down{i}")
            self.add_module(self._downs[-1], block)
        self.up1 = _UpBlock(widths[3], widths[2], affine=affine)
        self.up2 = _UpBlock(widths[2], widths[1], affine=affine)
        self.up3 = _UpBlock(widths[1], widths[0], affine=affine)
        self.norm = InstanceNorm3d(widths[0], affine)
        self.output = nn.Conv3d(widths[0], out_channels, 1, bias=not paper)
        if paper:
            for module in self.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            # Small logits start at 1/2 everywhere: a saturated softmax gives a pure Dice loss no gradient.
            nn.init.normal_(self.output.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, X, Y, Z], sides of at least 16 voxels → logits [B, out_channels, X, Y, Z]."""
        h = self.input(x)
        features = {"input": h}
        for name in self._downs:
            h = self.get_submodule(name)(h)
            features[name] = h
        for up, skip in zip((self.up1, self.up2, self.up3), reversed(self._skips), strict=True):
            h = up(h, features[skip])
        return self.output(F.relu(self.norm(h)))
