"""A trained prior over the kernels of a network, block by block, and its folder on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwp_pyro.distributions.kernel_density import KernelDensity, KernelGaussian
from dwp_pyro.distributions.kernel_flow import KernelFlow
from dwp_pyro.distributions.kernel_mixture import KernelMixture
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.errors import PriorError
from dwp_pyro.storage import read_json, write_json
from dwp_pyro.tensors import fill_module, load_tensors, save_tensors

__all__ = ["ANY_SITE", "DENSITIES", "BlockCard", "KernelPrior"]

#: Of a kernel, and of all layers of its density together; those of real networks are far below.
_MOST_WEIGHTS, _MOST_UNITS = 1331, 8192

FORMAT_VERSION = 2

#: Family → its density, made from a kernel's shape and `KernelDensity.form`.
DENSITIES: dict[str, type[KernelDensity]] = {
    "gaussian": KernelGaussian,
    "mixture": KernelMixture,
    "flow": KernelFlow,
    "dwp": KernelVAE,
}

#: Stands for every site, in the one block of a prior whose kernels came without names.
ANY_SITE = "*"


@dataclass(frozen=True)
class BlockCard:
    """What a block is and how good.

    Args:
        sites: names of the convolutions' weights that it stands for, or `ANY_SITE` alone.
        kernels: number of kernels it was fitted to.
        nats_per_kernel: held-out log-density of this prior and of its controls, in nats a kernel.
    """

    sites: tuple[str, ...]
    kernels: int
    nats_per_kernel: Mapping[str, float] = field(default_factory=dict)


class KernelPrior(nn.Module):
    """One density a block, all of one family. As a module it moves, freezes and saves like any other.

    Args:
        family: one of `DENSITIES`.
        blocks: block name → density.
        cards: block name → card; the same names.
        provenance: where the kernels came from; free JSON, holds no image.
        name: what messages call it: the folder that it is from.
    """

    def __init__(
        self,
        family: str,
        blocks: Mapping[str, KernelDensity],
        cards: Mapping[str, BlockCard],
        provenance: Mapping[str, Any] | None = None,
        name: str = "kernel prior",
    ) -> None:
        super().__init__()
        if blocks.keys() != cards.keys():
            raise ValueError(f"blocks {sorted(blocks)} and cards {sorted(cards)} must have the same names")
        if any(type(block) is not DENSITIES[family] for block in blocks.values()):
            raise ValueError(f"every block of a '{family}' prior must be a {DENSITIES[family].__name__}")
        self.family = family
        self.blocks = nn.ModuleDict(blocks)
        self.cards = dict(cards)
        self.provenance = dict(provenance or {})
        self.name = name

    def of_family(self, name: str) -> KernelPrior:
        """This prior, or the simpler one that it holds.

        Args:
            name: its own family; "gaussian" for the full-covariance Gaussian of each block; "isotropic" for
                independent weights around 0, as spread as the block's are.

        Raises:
            PriorError: for another family.
        """
        if name == self.family:
            return self
        if name not in ("gaussian", "isotropic"):
            raise PriorError(
                f"{self.name}: holds densities of the family '{self.family}', not '{name}'; "
                f"fit them with 'dwp-pyro fit-prior --family {name}'"
            )
        blocks = {}
        for block in self.cards:
            density = self.block(block)
            gaussian = KernelGaussian(density.kernel_shape).to(density.loc)
            if name == "isotropic":
                spread = density.root_mean_square().expand_as(density.loc).diag()
                gaussian.standardise_by(torch.zeros_like(density.loc), spread)
            else:
                gaussian.standardise_by(density.loc, density.scale_tril)
            blocks[block] = gaussian
        return KernelPrior("gaussian", blocks, self.cards, self.provenance, self.name).requires_grad_(False)

    def at_sites(self, blocks: Mapping[str, str], *, anew: bool = False) -> KernelPrior:
        """This prior, standing for the kernels of a network.

        Args:
            blocks: site → block. Counts where the prior was fitted to sites of other names, another kind of network.
            anew: count in any case, but for a prior whose one block stands for every site.

        Raises:
            PriorError: if it has not all of these blocks.
        """
        known = {site for card in self.cards.values() for site in card.sites}
        if ANY_SITE in known or (blocks.keys() <= known and not anew):
            return self
        for site, block in blocks.items():
            if block not in self.cards:
                raise PriorError(
                    f"{self.name}: has no block '{block}' for '{site}' (blocks: {', '.join(self.cards)}); "
                    "name one of these for it by --blocks"
                )
        cards = {
            name: replace(card, sites=tuple(site for site, block in blocks.items() if block == name))
            for name, card in self.cards.items()
        }
        densities = {name: self.block(name) for name in cards}
        return KernelPrior(self.family, densities, cards, self.provenance, self.name)

    def block_names(self, sites: Iterable[str]) -> dict[str, str]:
        """Site → name of the block that stands for it."""
        names = {site: name for name, card in self.cards.items() for site in card.sites}
        return {site: names[site if site in names else ANY_SITE] for site in sites}

    def block_at(self, site: str, shape: Sequence[int]) -> KernelDensity:
        """The density of the kernels at a site of shape [out, in, k₁, …, k_d].

        Raises:
            PriorError: if no block stands for the site, or the block's kernels have another shape.
        """
        for name, card in self.cards.items():
            if site in card.sites or ANY_SITE in card.sites:
                block = self.block(name)
                if tuple(block.kernel_shape) != tuple(shape[2:]):
                    expected = "×".join(map(str, shape[2:]))
                    found = "×".join(map(str, block.kernel_shape))
                    raise PriorError(
                        f"{self.name}: block '{name}' holds {found} kernels, but '{site}' has {expected}; "
                        "fit a prior to kernels of that shape"
                    )
                return block
        raise PriorError(
            f"{self.name}: no block stands for '{site}' (blocks: {', '.join(self.cards)}); "
            "fit a prior with a network of the same form"
        )

    def block(self, name: str) -> KernelDensity:
        """The density of a block by its name."""
        module = self.blocks[name]
        assert isinstance(module, KernelDensity)
        return module

    @torch.no_grad()
    def sample_at(self, site: str, shape: Sequence[int]) -> Tensor:
        """Kernels drawn from the prior at a site, of shape [out, in, k₁, …, k_d]."""
        return self.block_at(site, shape).rsample(shape[:2])

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Put draws of the prior into weights, site → [out, in, k₁, …, k_d], in place."""
        for site, weight in weights.items():
            weight.copy_(self.sample_at(site, weight.shape))

    def save(self, folder: Path) -> None:
        """Write `prior.safetensors` and `prior.json`; the JSON last, so that it stands for the whole."""
        save_tensors(folder / "prior.safetensors", self.state_dict())
        write_json(
            folder / "prior.json",
            {
                "format": FORMAT_VERSION,
                "family": self.family,
                "blocks": {
                    name: {
                        "kernel_shape": list(self.block(name).kernel_shape),
                        "form": self.block(name).form(),
                        "sites": list(card.sites),
                        "kernels": card.kernels,
                        "kernel_scale": float(self.block(name).root_mean_square()),
                        "nats_per_kernel": dict(card.nats_per_kernel),
                    }
                    for name, card in self.cards.items()
                },
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> KernelPrior:
        """Read what `save` wrote, its parameters frozen.

        Raises:
            PriorError: if the folder holds no prior, one of another format, or a damaged one.
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
            for item in description["blocks"].values():
                _check_size(item["kernel_shape"], item["form"])
            blocks = {
                str(name): DENSITIES[family]([int(side) for side in item["kernel_shape"]], **item["form"])
                for name, item in description["blocks"].items()
            }
            cards = {
                str(name): BlockCard(
                    tuple(item["sites"]),
                    int(item["kernels"]),
                    {str(key): float(nats) for key, nats in item["nats_per_kernel"].items()},
                )
                for name, item in description["blocks"].items()
            }
            if not cards or not all(
                isinstance(item["sites"], list) and all(isinstance(site, str) for site in item["sites"])
                for item in description["blocks"].values()
            ):
                raise ValueError("each block needs a list of sites")
            prior = cls(family, blocks, cards, description.get("provenance"), str(folder))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as problem:
            raise PriorError(
                f"{path}: is not a kernel prior's description ({problem!r}); fit the prior again"
            ) from problem
        tensors, _ = load_tensors(folder / "prior.safetensors", PriorError)
        try:
            fill_module(prior, tensors)
            for name in cards:
                if not (prior.block(name).scale_tril.diagonal() > 0).all():
                    raise ValueError(f"the spread of block '{name}' is not above 0")
        except ValueError as problem:
            reason = " ".join(str(problem).split())[:200]
            raise PriorError(
                f"{folder / 'prior.safetensors'}: does not match {path.name} ({reason}); fit the prior again"
            ) from problem
        return prior.requires_grad_(False)


def _check_size(kernel_shape: Sequence[int], form: Mapping[str, Any]) -> None:
    """Raise ValueError for a density that would take absurd memory, before it takes any."""
    numbers = [number for value in form.values() for number in (value if isinstance(value, list) else [value])]
    if math.prod(kernel_shape) > _MOST_WEIGHTS or sum(map(abs, numbers)) > _MOST_UNITS:
        raise ValueError(f"kernels of {list(kernel_shape)} and a density of {dict(form)} are too large to be true")
