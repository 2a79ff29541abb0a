"""A fitted prior over the kernels of a network, one distribution per block, and its folder on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwp_pyro.config.names import MAX_UNITS
from dwp_pyro.densities import DENSITIES, KernelDistribution, KernelGaussian
from dwp_pyro.priors.bank import MAX_WEIGHTS
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.files import read_json, write_json
from dwp_pyro.runtime.tensors import fill_module, load_tensors, save_tensors

__all__ = ["ANY_SITE", "BlockInfo", "KernelPrior"]

FORMAT_VERSION = 3

#: Matches every site; the site of the single block of a prior that was fitted to kernels without names.
ANY_SITE = "*"


@dataclass(frozen=True)
class BlockInfo:
    """Sites, kernels and scores of a block.

    Args:
        sites: Parameter names of the convolution weights in the block, or `ANY_SITE` alone.
        kernels: Number of kernels that it was fitted to.
        nats_per_kernel: Held-out log-density of this prior and of its controls, in nats per kernel.
    """

    sites: tuple[str, ...]
    kernels: int
    nats_per_kernel: Mapping[str, float] = field(default_factory=dict)


class KernelPrior(nn.Module):
    """One kernel distribution per block, all of one family, as a module.

    Args:
        family: One of `DENSITIES`.
        blocks: Block → distribution.
        block_infos: Block → sites, kernels and scores; the same blocks.
        provenance: Origin of the kernels, as JSON values; no images.
        name: Name in messages: the folder that it was read from.

    Raises:
        ValueError: If the blocks do not match or are of another family.

    Examples:
        With the folder of `fit_prior`'s example:

        >>> from pathlib import Path
        >>> from dwp_pyro import KernelPrior
        >>> prior = KernelPrior.load(Path("runs/prior-ms"))
        >>> tuple(prior.sample_at("up1.conv1.weight", (4, 4, 3, 3, 3)).shape)
        (4, 4, 3, 3, 3)
    """

    def __init__(
        self,
        family: str,
        blocks: Mapping[str, KernelDistribution],
        block_infos: Mapping[str, BlockInfo],
        provenance: Mapping[str, Any] | None = None,
        name: str = "kernel prior",
    ) -> None:
        super().__init__()
        if blocks.keys() != block_infos.keys():
            raise ValueError(f"blocks {sorted(blocks)} and infos {sorted(block_infos)} must have the same names")
        if any(type(block) is not DENSITIES[family] for block in blocks.values()):
            raise ValueError(f"every block of a '{family}' prior must be a {DENSITIES[family].__name__}")
        self.family = family
        self.blocks = nn.ModuleDict(blocks)
        self.block_infos = dict(block_infos)
        self.provenance = dict(provenance or {})
        self.name = name

    def as_family(self, name: str) -> KernelPrior:
        """Return this prior, or the simpler one that it contains.

        Args:
            name: Its own family; "gaussian" for the full-covariance Gaussian of each block; "isotropic" for
                independent weights around 0 with the root mean square of the block's.

        Raises:
            PriorError: If the prior holds another family.
        """
        if name == self.family:
            return self
        if name not in ("gaussian", "isotropic"):
            raise PriorError(
                f"{self.name}: holds densities of the family '{self.family}', not '{name}'; "
                f"fit a prior of the family '{name}'"
            )
        blocks = {}
        for block in self.block_infos:
            density = self.block(block)
            gaussian = KernelGaussian(density.kernel_shape).to(density.loc)
            loc, scale_tril = density.loc, density.scale_tril
            if name == "isotropic":
                loc, scale_tril = torch.zeros_like(loc), density.root_mean_square().expand_as(loc).diag()
            gaussian.standardize_by(loc, scale_tril)
            blocks[block] = gaussian
        return KernelPrior("gaussian", blocks, self.block_infos, self.provenance, self.name).requires_grad_(False)

    def assign_sites(self, blocks: Mapping[str, str], *, override: bool = False) -> KernelPrior:
        """Return this prior with the kernel sites of a network assigned to its blocks.

        A prior that knows all of these sites, or one with `ANY_SITE`, is returned unchanged without `override`.

        Args:
            blocks: Site → block.
            override: Whether to replace the sites that the prior knows, too.

        Raises:
            PriorError: If the prior lacks one of these blocks.
        """
        known = {site for info in self.block_infos.values() for site in info.sites}
        if (ANY_SITE in known or blocks.keys() <= known) and not override:
            return self
        for site, block in blocks.items():
            if block not in self.block_infos:
                raise PriorError(
                    f"{self.name}: has no block '{block}' for '{site}' (blocks: {', '.join(self.block_infos)}); "
                    "assign one of these to it"
                )
        block_infos = {
            name: replace(info, sites=tuple(site for site, block in blocks.items() if block == name))
            for name, info in self.block_infos.items()
        }
        densities = {name: self.block(name) for name in block_infos}
        return KernelPrior(self.family, densities, block_infos, self.provenance, self.name)

    def block_name(self, site: str) -> str:
        """Return the name of the block of a site.

        Raises:
            PriorError: If no block has the site.
        """
        for name, info in self.block_infos.items():
            if site in info.sites or ANY_SITE in info.sites:
                return name
        raise PriorError(
            f"{self.name}: no block has the site '{site}' (blocks: {', '.join(self.block_infos)}); "
            "fit a prior with a network of the same kind"
        )

    def block_at(self, site: str, shape: Sequence[int]) -> KernelDistribution:
        """Return the distribution of the kernels at a site.

        Args:
            site: Name of the site.
            shape: Shape of its weight, [out, in, k₁, …, k_d].

        Raises:
            PriorError: If no block has the site, or the block's kernels have another shape.
        """
        name = self.block_name(site)
        block = self.block(name)
        if tuple(block.kernel_shape) != tuple(shape[2:]):
            expected, found = ("×".join(map(str, sides)) for sides in (shape[2:], block.kernel_shape))
            raise PriorError(
                f"{self.name}: block '{name}' holds {found} kernels, but '{site}' has {expected}; "
                "fit a prior to kernels of that shape"
            )
        return block

    def block(self, name: str) -> KernelDistribution:
        """Return the distribution of a block."""
        module = self.blocks[name]
        assert isinstance(module, KernelDistribution)
        return module

    @torch.no_grad()
    def sample_at(self, site: str, shape: Sequence[int]) -> Tensor:
        """Draw the kernels of a site, of shape [out, in, k₁, …, k_d]."""
        return self.block_at(site, shape).rsample(shape[:2])

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Fill weights with draws of the prior, in place.

        Args:
            weights: Site → weight, [out, in, k₁, …, k_d].
        """
        for site, weight in weights.items():
            weight.copy_(self.sample_at(site, weight.shape))

    def save(self, folder: Path) -> None:
        """Write `prior.safetensors` and `prior.json`, the JSON last: its presence marks a complete prior."""
        save_tensors(folder / "prior.safetensors", self.state_dict())
        write_json(
            folder / "prior.json",
            {
                "format": FORMAT_VERSION,
                "family": self.family,
                "blocks": {
                    name: {
                        "kernel_shape": list(self.block(name).kernel_shape),
                        "form": self.block(name).init_args(),
                        "sites": list(info.sites),
                        "kernels": info.kernels,
                        "kernel_scale": float(self.block(name).root_mean_square()),
                        "nats_per_kernel": dict(info.nats_per_kernel),
                    }
                    for name, info in self.block_infos.items()
                },
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> KernelPrior:
        """Read a saved prior, its parameters frozen.

        Raises:
            PriorError: If the folder holds no prior, a damaged one or one of another format.
        """
        path = folder / "prior.json"
        if not path.exists():
            raise PriorError(f"{folder}: holds no kernel prior (prior.json); make one with 'dwp-pyro fit-prior'")
        description = read_json(path, PriorError)
        if description.get("format") != FORMAT_VERSION:
            raise PriorError(
                f"{path}: has format {description.get('format')!r}, this version reads format {FORMAT_VERSION}; "
                "fit the prior again, or install the version that made it"
            )
        try:
            family = description["family"]
            blocks, block_infos = {}, {}
            for name, item in description["blocks"].items():
                _check_size(item["kernel_shape"], item["form"])
                blocks[name] = DENSITIES[family]([int(side) for side in item["kernel_shape"]], **item["form"])
                sites = item["sites"]
                if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
                    raise ValueError("each block needs a list of sites")
                nats = {key: float(value) for key, value in item["nats_per_kernel"].items()}
                block_infos[name] = BlockInfo(tuple(sites), int(item["kernels"]), nats)
            if not blocks:
                raise ValueError("no block")
            prior = cls(family, blocks, block_infos, description.get("provenance"), str(folder))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as problem:
            raise PriorError(
                f"{path}: is not a kernel prior's description ({problem!r}); fit the prior again"
            ) from problem
        tensors, _ = load_tensors(folder / "prior.safetensors", PriorError)
        try:
            fill_module(prior, tensors)
            for name in block_infos:
                if not (prior.block(name).scale_tril.diagonal() > 0).all():
                    raise ValueError(f"the spread of block '{name}' is not above 0")
        except ValueError as problem:
            reason = " ".join(str(problem).split())[:200]
            raise PriorError(
                f"{folder / 'prior.safetensors'}: does not match {path.name} ({reason}); fit the prior again"
            ) from problem
        return prior.requires_grad_(False)


def _check_size(kernel_shape: Sequence[int], init_args: Mapping[str, Any]) -> None:
    """Raise ValueError for a distribution that would exhaust memory."""
    numbers = [number for value in init_args.values() for number in (value if isinstance(value, list) else [value])]
    if math.prod(kernel_shape) > MAX_WEIGHTS or sum(map(abs, numbers)) > MAX_UNITS:
        raise ValueError(f"kernels of {list(kernel_shape)} and a distribution of {dict(init_args)} exceed the limits")
