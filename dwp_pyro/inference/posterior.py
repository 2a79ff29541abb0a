"""A trained network, Bayesian or not, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dwp_pyro.data.layouts import LAYOUTS
from dwp_pyro.errors import RunError
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = ["NetworkCard", "Posterior"]

FORMAT_VERSION = 1


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


class Posterior:
    """q(W) over the kernels of a network, and its deterministic weights.

    Args:
        card: the network's form.
        network: a plain `ResidualUNet3d`; of the sites in `guide` its own weights are not used.
        guide: None for a deterministic network, whose "samples" are all alike.
    """

    def __init__(self, card: NetworkCard, network: nn.Module, guide: MeanFieldNormal | None) -> None:
        self.card = card
        self.network = network.eval().requires_grad_(False)
        self.guide = guide

    def draw(self, seed: int) -> dict[str, Tensor]:
        """One sample of the kernels, the same for the same seed; empty for a deterministic network."""
        if self.guide is None:
            return {}
        return self.guide.draw(torch.Generator().manual_seed(seed))

    def means(self) -> dict[str, Tensor]:
        """The kernels' posterior means; empty for a deterministic network."""
        return {} if self.guide is None else self.guide.means()

    def logits(self, image: Tensor, kernels: Mapping[str, Tensor]) -> Tensor:
        """Image [B, channels, X, Y, Z] and kernels from `draw` or `means` → logits [B, 2, X, Y, Z]."""
        output: Tensor = functional_call(self.network, dict(kernels), (image,))
        return output

    def to(self, device: torch.device) -> Posterior:
        """Move to a device, in place."""
        self.network.to(device)
        if self.guide is not None:
            self.guide.to(device)
        return self

    def save(self, path: Path) -> None:
        """Write one safetensors file: the tensors, and the card in its header."""
        sites = list(self.guide.sites) if self.guide is not None else []
        deterministic = {name: value for name, value in self.network.state_dict().items() if name not in sites}
        tensors = {f"network.{name}": value for name, value in deterministic.items()}
        for site in sites:
            assert self.guide is not None
            loc, scale = self.guide.posterior(site)
            tensors |= {f"loc.{site}": loc, f"scale.{site}": scale}
        save_tensors(path, tensors, {"format": FORMAT_VERSION, "network": asdict(self.card), "sites": sites})

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
            network = card.network()
            means = {site: tensors[f"loc.{site}"] for site in metadata["sites"]}
            plain = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
            network.load_state_dict(plain | means)
            guide = None
            if metadata["sites"]:
                guide = MeanFieldNormal(means)
                for site in means:
                    guide.set_scale(site, tensors[f"scale.{site}"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise RunError(f"{path}: does not hold a network of this version ({reason}); train it again") from problem
        return cls(card, network, guide)
