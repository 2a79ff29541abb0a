"""A trained network, Bayesian or not, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dwp_pyro.data.layouts import LAYOUTS
from dwp_pyro.errors import RunError
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = ["Member", "NetworkCard", "Posterior"]

FORMAT_VERSION = 2


@dataclass(frozen=True)
class NetworkCard:
    """What a trained network is and what it expects.

    Args:
        modalities: input channels, in order.
        widths: of the U-Net.
        short: six down blocks.
        layout: of the scans it was trained on.
        region: that it segments; output channel 1, background being 0.
        spacing: of its voxels in mm; None if scans are taken as they are.
        patch: window [x, y, z] for prediction: the shape of a training patch.
    """

    modalities: tuple[str, ...]
    widths: tuple[int, int, int, int]
    short: bool
    layout: str
    region: str
    spacing: float | None
    patch: tuple[int, int, int]

    def network(self) -> ResidualUNet3d:
        """A network of this form, at its random start."""
        return ResidualUNet3d(len(self.modalities), 2, self.widths, self.short)


class Member(NamedTuple):
    """One network of a posterior.

    Args:
        network: a plain `ResidualUNet3d`; of the sites in `guide` its own weights are not used.
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
        """Image [B, channels, X, Y, Z] and weights from `draw` or `means` → logits [B, 2, X, Y, Z]."""
        output: Tensor = functional_call(self.members[0].network, dict(weights), (image,))
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
            for site in sites:
                assert guide is not None
                loc, scale = guide.posterior(site)
                tensors |= {f"{number}.loc.{site}": loc, f"{number}.scale.{site}": scale}
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
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in metadata["network"].items()
            }
            card = NetworkCard(**fields)
            if card.layout not in LAYOUTS:
                raise ValueError(f"layout {card.layout!r}")
            members = [_member(card, tensors, number, sites) for number, sites in enumerate(metadata["sites"])]
            if not members:
                raise ValueError("no member")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise RunError(f"{path}: does not hold a network of this version ({reason}); train it again") from problem
        return cls(card, members)


def _member(card: NetworkCard, tensors: Mapping[str, Tensor], number: int, sites: Sequence[str]) -> Member:
    network = card.network()
    means = {site: tensors[f"{number}.loc.{site}"] for site in sites}
    prefix = f"{number}.network."
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    network.load_state_dict(plain | means)
    if not means:
        return Member(network, None)
    guide = MeanFieldNormal(means)
    for site in means:
        guide.set_scale(site, tensors[f"{number}.scale.{site}"])
    return Member(network, guide)
