"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from monai.networks.nets import BasicUNet, DynUNet, MedNeXt, SegResNet, UNet
from torch import nn

from dwp_pyro.models.ops.conv3d import Conv3d
from dwp_pyro.models.unet import ResidualUNet3d

__all__ = ["NETWORKS", "NetworkKind", "build_network"]


@dataclass(frozen=True)
class NetworkKind:
    """A kind of network.

    Args:
        build: Function of input channels, output channels and four widths that returns a network.
        stride: Stride of the deepest features in voxels; sides of a patch must be multiples of it.
        first_last: Prefixes of the parameter names of the first and the last block.
    """

    build: Callable[..., nn.Module]
    stride: int
    first_last: tuple[str, ...]


def _unet(in_channels: int, out_channels: int, widths: tuple[int, ...]) -> nn.Module:
    # MONAI's last kernels depend on the number of outputs; with a 1×1×1 output convolution no spatial kernel does.
    body = UNet(3, in_channels, widths[0], widths, (2,) * (len(widths) - 1), num_res_units=2)
    return nn.Sequential(body, nn.Conv3d(widths[0], out_channels, 1))


def _segresnet(in_channels: int, out_channels: int, widths: tuple[int, ...]) -> nn.Module:
    return SegResNet(3, widths[0], in_channels, out_channels)


def _dynunet(in_channels: int, out_channels: int, widths: tuple[int, ...]) -> nn.Module:
    strides = (1, *(2,) * (len(widths) - 1))
    network = DynUNet(3, in_channels, out_channels, (3,) * len(widths), strides, strides[1:], widths)
    # Each block has two names, and torch.func.functional_call restores weights under one name only.
    for name in ("input_block", "downsamples", "bottleneck", "upsamples"):
        delattr(network, name)
    return network


def _basicunet(in_channels: int, out_channels: int, widths: tuple[int, ...]) -> nn.Module:
    return BasicUNet(3, in_channels, out_channels, (*widths, widths[-1], widths[0]))


def _mednext(in_channels: int, out_channels: int, widths: tuple[int, ...], kernel_size: int = 5) -> nn.Module:
    one_per_stage = (1,) * (len(widths) - 1)
    network = MedNeXt(
        3,
        widths[0],
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        blocks_down=one_per_stage,
        blocks_bottleneck=1,
        blocks_up=one_per_stage,
    )
    # MONAI's transposed 1×1×1 convolution has its outputs in the second dimension.
    network.out_0.conv_out = nn.Conv3d(widths[0], out_channels, 1)
    return network


_MEDNEXT_FIRST_LAST = ("stem.", "enc_stages.0.", "dec_stages.2.", "out_0.")

#: Name → kind; the names alone are `config.training.NETWORK_NAMES`.
NETWORKS = {
    "residual-unet": NetworkKind(ResidualUNet3d, 8, ("input.", "down1.", "up3.", "norm.", "output.")),
    "paper-unet": NetworkKind(partial(ResidualUNet3d, paper=True), 8, ("input.", "down1.", "up3.", "output.")),
    "unet": NetworkKind(_unet, 8, ("0.model.0.", "0.model.2.", "1.")),
    "segresnet": NetworkKind(
        _segresnet, 8, ("convInit.", "down_layers.0.", "up_samples.2.", "up_layers.2.", "conv_final.")
    ),
    "dynunet": NetworkKind(_dynunet, 8, ("skip_layers.downsample.", "skip_layers.upsample.", "output_block.")),
    "basicunet": NetworkKind(_basicunet, 16, ("conv_0.", "upcat_1.", "final_conv.")),
    "mednext": NetworkKind(_mednext, 8, _MEDNEXT_FIRST_LAST),
    "mednext-7": NetworkKind(partial(_mednext, kernel_size=7), 8, _MEDNEXT_FIRST_LAST),
}


def build_network(name: str, in_channels: int, out_channels: int, widths: tuple[int, ...]) -> nn.Module:
    """Return a randomly initialized network, one of `NETWORKS`.

    `widths` are the channels at full, half, quarter and eighth resolution; "basicunet" repeats the last at a sixteenth.
    """
    network = NETWORKS[name].build(in_channels, out_channels, widths)
    for module in network.modules():
        if type(module) is nn.Conv3d and max(module.kernel_size) > 1:
            module.__class__ = Conv3d  # faster on a CPU
    return network
