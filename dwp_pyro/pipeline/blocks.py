"""The prior blocks of a run's network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from dwp_pyro.errors import ConfigError
from dwp_pyro.models.blocks import kernel_sites, prior_blocks
from dwp_pyro.storage import read_yaml, write_yaml

__all__ = ["BLOCKS_FILE", "assign_blocks", "by_block", "read_blocks", "write_blocks"]

BLOCKS_FILE = "blocks.yaml"


def assign_blocks(network: nn.Module, file: str | None) -> dict[str, str]:
    """The block of each kernel site, as the file says or else by `prior_blocks`.

    Args:
        network: not yet a Pyro program.
        file: YAML, block → list of prefixes of parameter names ("down1", "down2.conv1").

    Raises:
        ConfigError: naming the file, if it is no such mapping, or leaves a kernel without a block or with two.
    """
    if file is None:
        return prior_blocks(network)
    return read_blocks(Path(file), kernel_sites(network))


def read_blocks(path: Path, sites: Iterable[str]) -> dict[str, str]:
    """The block of each site by a file; see `assign_blocks`."""
    content = read_yaml(path, ConfigError)
    for block, prefixes in content.items():
        # A block is a name of a module and of a file.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", block) or hasattr(nn.ModuleDict(), block):
            raise ConfigError(f"{path}: '{block}' cannot be a block's name; take another, of letters and digits")
        if not isinstance(prefixes, list) or not all(isinstance(prefix, str) for prefix in prefixes):
            raise ConfigError(f"{path}: '{block}' should be a list of prefixes of parameter names")
    blocks: dict[str, str] = {}
    for site in sites:
        found = [
            str(block)
            for block, prefixes in content.items()
            if any(site == prefix or site.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        if len(found) != 1:
            problem = "is in no block" if not found else f"is in two blocks, {found[0]} and {found[1]}"
            raise ConfigError(f"{path}: kernel '{site}' {problem}; each needs one")
        blocks[site] = found[0]
    return blocks


def by_block(blocks: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Block → its sites, in the order in which the blocks first appear."""
    sites: dict[str, list[str]] = {}
    for site, block in blocks.items():
        sites.setdefault(block, []).append(site)
    return {block: tuple(names) for block, names in sites.items()}


def write_blocks(folder: Path, blocks: Mapping[str, str]) -> None:
    """Write `blocks.yaml` into a run's folder: a file that `--blocks` takes, once edited to one's liking."""
    content = {block: [site.removesuffix(".weight") for site in sites] for block, sites in by_block(blocks).items()}
    write_yaml(folder / BLOCKS_FILE, content)
