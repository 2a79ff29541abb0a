"""A trained network, Bayesian or not, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from dwp_pyro.data.layouts import LAYOUTS
from dwp_pyro.data.regions import structure
from dwp_pyro.errors import RunError
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.models.likelihoods import ACTIVATIONS, region_masks
from dwp_pyro.models.networks import NETWORKS, build_network
from dwp_pyro.tensors import fill_module, load_tensors, save_tensors

__all__ = ["Member", "NetworkCard", "Posterior"]

FORMAT_VERSION = 5


@dataclass(frozen=True)
class NetworkCard:
    """What a trained network is and what it expects.

    Args:
        modalities: input channels, in order.
        regions: that it segments: output channels 1, 2, …, background being 0.
        values: of each region, the label values that make it up in the scans it was trained on.
        layout: of those scans.
        spacing: of its voxels in mm; None if scans are taken as they are.
        patch: window [x, y, z] for prediction: the shape of a training patch.
        network: its kind, one of `NETWORKS`.
        widths: its channels at each resolution.
        may_lack_modalities: it has learned to do without some.
        activation: "softmax" for regions that exclude each other, "sigmoid" for those that may overlap.
    """

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    layout: str
    spacing: float | None
    patch: tuple[int, int, int]
    network: str = "residual-unet"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    may_lack_modalities: bool = False
    activation: str = "sigmoid"

    def build(self) -> nn.Module:
        """A network of this form, at its random start."""
        return build_network(self.network, len(self.modalities), 1 + len(self.regions), self.widths)

    def masks(self, probability: NDArray[np.float32]) -> NDArray[np.bool_]:
        """What is segmented: probability [R, X, Y, Z] → masks of the regions; see `region_masks`."""
        masks: NDArray[np.bool_] = region_masks(torch.from_numpy(probability), self.activation).numpy()
        return masks

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> NetworkCard:
        """What `dataclasses.asdict` made, after JSON.

        Raises:
            TypeError, ValueError: if the fields are others.
        """

        def frozen(value: Any) -> Any:
            return tuple(frozen(part) for part in value) if isinstance(value, list | tuple) else value

        card = cls(**{name: frozen(value) for name, value in fields.items()})
        if card.network not in NETWORKS:
            raise ValueError(f"network {card.network!r}")
        if card.activation not in ACTIVATIONS:
            raise ValueError(f"activation {card.activation!r}")
        if not card.modalities or not all(isinstance(name, str) and name.isalnum() for name in card.modalities):
            raise ValueError(f"modalities {card.modalities!r}")  # exports name them where MONAI looks for code
        if not card.regions or any(not isinstance(name, str) or structure(name) != name for name in card.regions):
            raise ValueError(f"regions {card.regions!r}")  # they are in names of files
        if len(card.values) != len(card.regions) or not all(card.values):
            raise ValueError(f"values {card.values!r}")
        return card


class Member(NamedTuple):
    """One network of a posterior.

    Args:
        network: a plain network of the card's form; of the sites in `guide` its own weights are not used.
        guide: q over its kernels; None for a deterministic network, whose "samples" are all alike.
    """

    network: nn.Module
    guide: MeanFieldNormal | None

    def weights(self, kernels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights by name: the deterministic ones, and these kernels."""
        return {**self.network.state_dict(), **kernels}


class Posterior:
    """q(W), an equal mixture of members: networks of one form, each with its own kernels and deterministic weights.

    Args:
        card: the networks' form.
        members: at least one.
    """

    def __init__(self, card: NetworkCard, members: Sequence[Member]) -> None:
        self.card = card
        self.members = tuple(members)
        for member in self.members:
            member.network.eval().requires_grad_(False)
        # Weights come with each call: they are not put into a member, which is drawn from meanwhile.
        with torch.device("meta"):
            self._form = card.build().eval()

    def draw(self, seed: int, member: int = 0) -> dict[str, Tensor]:
        """All weights of a member, its kernels one sample that is the same for the same seed."""
        chosen = self.members[member]
        if chosen.guide is None:
            return chosen.weights({})
        return chosen.weights(chosen.guide.draw(torch.Generator().manual_seed(seed)))

    def means(self, member: int = 0) -> dict[str, Tensor]:
        """All weights of a member, its kernels at their posterior means."""
        chosen = self.members[member]
        return chosen.weights({} if chosen.guide is None else chosen.guide.means())

    def logits(self, image: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Image [B, channels, X, Y, Z] and weights from `draw` or `means` → logits [B, 1 + R, X, Y, Z]."""
        output: Tensor = functional_call(self._form, dict(weights), (image,))
        return output

    def to(self, device: torch.device) -> Posterior:
        """Move to a device, in place."""
        for network, guide in self.members:
            network.to(device)
            if guide is not None:
                guide.to(device)
        return self

    def save(self, path: Path) -> None:
        """Write one safetensors file: the tensors, and the card in its header."""
        tensors: dict[str, Tensor] = {}
        for number, (network, guide) in enumerate(self.members):
            sites = guide.sites if guide is not None else ()
            deterministic = {name: value for name, value in network.state_dict().items() if name not in sites}
            tensors |= {f"{number}.network.{name}": value for name, value in deterministic.items()}
            for site, mean in guide.means().items() if guide is not None else ():
                assert guide is not None
                tensors |= {f"{number}.loc.{site}": mean, f"{number}.scale.{site}": guide.scale(site)}
                tensors[f"{number}.unit.{site}"] = guide.unit(site)
        sites_of = [list(guide.sites) if guide is not None else [] for _, guide in self.members]
        save_tensors(path, tensors, {"format": FORMAT_VERSION, "network": asdict(self.card), "sites": sites_of})

    @classmethod
    def load(cls, path: Path) -> Posterior:
        """Read what `save` wrote.

        Raises:
            RunError: if the file is missing, damaged, or of another format.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT_VERSION:
            raise RunError(
                f"{path}: has format {metadata.get('format')!r}, this version reads {FORMAT_VERSION}; train it again"
            )
        try:
            card = NetworkCard.from_mapping(metadata["network"])
            if card.layout not in LAYOUTS:
                raise ValueError(f"layout {card.layout!r}")
            members = [_member(card, tensors, number, sites) for number, sites in enumerate(metadata["sites"])]
            if not members:
                raise ValueError("no member")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise RunError(f"{path}: does not hold a network of this version ({reason}); train it again") from problem
        return cls(card, members)


def _member(card: NetworkCard, tensors: Mapping[str, Tensor], number: int, sites: Sequence[str]) -> Member:
    means = {site: tensors[f"{number}.loc.{site}"] for site in sites}
    prefix = f"{number}.network."
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    with torch.device("meta"):  # a card that speaks of widths that are not there must not take their memory
        shapes = {name: tensor.shape for name, tensor in card.build().state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in (plain | means).items()}:
        raise ValueError("its tensors are not those of the network that it describes")
    network = card.build()
    fill_module(network, plain | means)
    if not means:
        return Member(network, None)
    units = {site: tensors[f"{number}.unit.{site}"] for site in means}
    for site, unit in units.items():
        size = means[site][0, 0].numel()
        diagonal = unit.diagonal() if unit.dim() == 2 else unit
        if unit.shape not in ((), (size,), (size, size)) or unit.dtype != means[site].dtype or not (diagonal > 0).all():
            raise ValueError(f"the unit of '{site}' is not one of its kernels")
    guide = MeanFieldNormal(means, units=units)
    for site, mean in means.items():
        scale = tensors[f"{number}.scale.{site}"]
        if (scale.shape, scale.dtype) != (mean.shape, mean.dtype) or not (scale > 0).all():
            raise ValueError(f"the standard deviations of '{site}' are not above 0, one a weight")
        guide.set_scale(site, scale)
    return Member(network, guide)
