"""Which prior block each kernel of a network belongs to, told from what the network does."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

__all__ = ["BLOCKS", "CONVOLUTIONS", "kernel_sites", "prior_blocks"]

#: The prior blocks, along the way of the data: a prior is fitted to the kernels of each.
BLOCKS = ("input", "scale1", "scale2", "bottom", "up1", "up2", "up3")

_DOWN, _UP = ("input", "scale1", "scale2"), ("up3", "up2", "up1")
#: Their kernels can be sample sites.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SIDE = 64  # voxels of the volume whose way is followed: 2 remain in a network that halves five times


def kernel_sites(network: nn.Module) -> dict[str, Tensor]:
    """The spatial kernels of a network: parameter name → weight [out, in, k₁, …, k_d].

    1×1×1 convolutions are not among them: they mix channels and have no shape in space. Nor are transposed ones.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, CONVOLUTIONS) and max(module.kernel_size) > 1
    }


def prior_blocks(network: nn.Module) -> dict[str, str]:
    """The block of each kernel site, in the order of the network's parameters.

    A kernel's block is the resolution of what it looks at, on the way down or up: full resolution "input" and "up3",
    half "scale1" and "up2", quarter "scale2" and "up1"; all below, or the lowest that the network has, is the "bottom".
    For `ResidualUNet3d` these are the blocks of Kuzina et al. 2019; for another encoder and decoder the same
    places. A network of one resolution is all "input".

    Args:
        network: takes images [B, channels, …]; it is not changed, and nothing is computed: shapes alone are followed.

    Raises:
        ValueError: if the network takes no volume of 64 voxels a side, or has no spatial kernel.
    """
    followed = copy.deepcopy(network).to("meta").eval()
    convolutions = {name: m for name, m in followed.named_modules() if isinstance(m, CONVOLUTIONS)}
    if not kernel_sites(followed):
        raise ValueError("the network has no convolution kernel of more than one voxel")
    seen: list[tuple[str, int]] = []

    def follow(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append((name, round(math.log2(_SIDE / inputs[0].shape[2]))))

        module.register_forward_pre_hook(hook)

    for name, module in convolutions.items():
        follow(name, module)
    first = next(iter(convolutions.values()))
    dimensions = len(first.kernel_size)
    # Of how many channels its images are the network does not say; it refuses any other number.
    for channels in dict.fromkeys(module.in_channels for module in convolutions.values()):
        seen.clear()
        try:
            with torch.no_grad():
                followed(torch.zeros((1, channels, *[_SIDE] * dimensions), dtype=first.weight.dtype, device="meta"))
            break
        except RuntimeError:
            continue
    else:
        raise ValueError(f"the network takes no volume of {_SIDE} voxels a side")
    deepest = max(level for _, level in seen)
    turn = max(place for place, (_, level) in enumerate(seen) if level == deepest)
    blocks: dict[str, str] = {}
    for place, (name, level) in enumerate(seen):
        on_the_way = _UP if deepest and place > turn else _DOWN
        at_bottom = level >= len(on_the_way) or 0 < level == deepest
        blocks.setdefault(f"{name}.weight", "bottom" if at_bottom else on_the_way[level])
    return {site: blocks[site] for site in kernel_sites(network) if site in blocks}
