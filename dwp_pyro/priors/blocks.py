"""Prior blocks: the sets of convolutions of a network that share a prior."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dwp_pyro.runtime.errors import ConfigError
from dwp_pyro.runtime.files import read_yaml, write_yaml

__all__ = [
    "BLOCKS",
    "BLOCKS_FILE",
    "CONVOLUTIONS",
    "assign_blocks",
    "by_block",
    "kernel_sites",
    "prior_blocks",
    "read_blocks",
    "write_blocks",
]

#: The prior blocks, in the order of the data flow.
BLOCKS = ("input", "scale1", "scale2", "bottom", "up1", "up2", "up3")

_DOWN, _UP = ("input", "scale1", "scale2"), ("up3", "up2", "up1")

#: Classes of modules whose kernels can be sample sites.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_SIDE = 64  # voxels of the traced volume; a network that halves five times keeps 2


def kernel_sites(network: nn.Module) -> dict[str, Tensor]:
    """Return the spatial kernels of a network: parameter name → weight [out, in, k₁, …, k_d].

    Excludes 1×1×1 convolutions, which mix channels only, and transposed ones.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, CONVOLUTIONS) and max(module.kernel_size) > 1
    }


def prior_blocks(network: nn.Module) -> dict[str, str]:
    """Return the block of each kernel site, in the order of the network's parameters.

    A kernel's block is the resolution of its input, in the encoder or the decoder: full resolution "input" and "up3",
    half "scale1" and "up2", quarter "scale2" and "up1"; the lower ones, or the network's lowest, are the "bottom". For
    `ResidualUNet3d` these are the blocks of Kuzina et al. 2019. A network of one resolution is all "input".

    Args:
        network: Network of images [B, channels, …]; unchanged, traced on the meta device.

    Raises:
        ValueError: If the network accepts no volume of 64 voxels per side or has no spatial kernel.
    """
    traced = copy.deepcopy(network).to("meta").eval()
    convolutions = {name: m for name, m in traced.named_modules() if isinstance(m, CONVOLUTIONS)}
    if not kernel_sites(traced):
        raise ValueError("the network has no convolution kernel of more than one voxel")
    seen: list[tuple[str, int]] = []

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((name, round(math.log2(_SIDE / inputs[0].shape[2]))))

    for name, module in convolutions.items():
        module.register_forward_pre_hook(partial(record, name))
    first = next(iter(convolutions.values()))
    dimensions = len(first.kernel_size)
    # The network does not state its number of input channels, and fails for any other number.
    for channels in dict.fromkeys(module.in_channels for module in convolutions.values()):
        seen.clear()
        try:
            with torch.no_grad():
                traced(torch.zeros((1, channels, *[_SIDE] * dimensions), dtype=first.weight.dtype, device="meta"))
            break
        except RuntimeError:
            continue
    else:
        raise ValueError(f"the network accepts no volume of {_SIDE} voxels per side")
    deepest = max(level for _, level in seen)
    last_deepest = max(index for index, (_, level) in enumerate(seen) if level == deepest)
    blocks: dict[str, str] = {}
    for index, (name, level) in enumerate(seen):
        path = _UP if deepest and index > last_deepest else _DOWN
        at_bottom = level >= len(path) or 0 < level == deepest
        blocks.setdefault(f"{name}.weight", "bottom" if at_bottom else path[level])
    return {site: blocks[site] for site in kernel_sites(network) if site in blocks}


BLOCKS_FILE = "blocks.yaml"


def assign_blocks(network: nn.Module, file: str | None) -> dict[str, str]:
    """Return the block of each kernel site, from a file or by `prior_blocks`.

    Args:
        network: Network that is not yet a Pyro program.
        file: YAML file, block → list of prefixes of parameter names ("down1", "down2.conv1"); None for `prior_blocks`.

    Raises:
        ConfigError: If the file is not such a mapping, or a kernel has no block or several.
    """
    if file is None:
        return prior_blocks(network)
    return read_blocks(Path(file), kernel_sites(network))


def read_blocks(path: Path, sites: Iterable[str]) -> dict[str, str]:
    """Return the block of each site from a file; see `assign_blocks`."""
    content = read_yaml(path, ConfigError)
    for block, prefixes in content.items():
        # Modules and files are named after blocks.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", block) or hasattr(nn.ModuleDict(), block):
            raise ConfigError(f"{path}: '{block}' cannot be a block's name; use letters and digits")
        if not isinstance(prefixes, list) or not all(isinstance(prefix, str) for prefix in prefixes):
            raise ConfigError(f"{path}: '{block}' must be a list of prefixes of parameter names")
    blocks: dict[str, str] = {}
    for site in sites:
        found = [
            str(block)
            for block, prefixes in content.items()
            if any(site == prefix or site.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        if len(found) != 1:
            problem = "is in no block" if not found else f"is in two blocks, {found[0]} and {found[1]}"
            raise ConfigError(f"{path}: kernel '{site}' {problem}; each needs one block")
        blocks[site] = found[0]
    return blocks


def by_block(blocks: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the sites of each block, blocks in order of appearance."""
    sites: dict[str, list[str]] = {}
    for site, block in blocks.items():
        sites.setdefault(block, []).append(site)
    return {block: tuple(names) for block, names in sites.items()}


def write_blocks(folder: Path, blocks: Mapping[str, str]) -> None:
    """Write `blocks.yaml`, a file for the setting `blocks`, into a run's folder."""
    content = {block: [site.removesuffix(".weight") for site in sites] for block, sites in by_block(blocks).items()}
    write_yaml(folder / BLOCKS_FILE, content)
