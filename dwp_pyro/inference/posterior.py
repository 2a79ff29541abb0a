"""Trained networks, Bayesian or deterministic, and their file."""

from __future__ import annotations

import math
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
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.decision import Decision
from dwp_pyro.models.likelihoods import ACTIVATIONS
from dwp_pyro.models.registry import NETWORKS, build_network
from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.tensors import fill_module, load_tensors, save_tensors

__all__ = ["Member", "NetworkConfig", "Posterior"]

FORMAT_VERSION = 6

_MAX_PATCH = 4096  # voxels per side

_HALF = Decision()


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of a trained network, and the input it expects.

    Args:
        modalities: Input channels, in order.
        regions: Segmented regions: output channels 1, 2, …; channel 0 is the background.
        values: Label values of each region in the training scans.
        layout: Layout of the training scans.
        spacing: Side of cubic voxels in mm; None for the scans' own spacing.
        patch: Window [x, y, z] for prediction: the shape of a training patch.
        network: Architecture, one of `NETWORKS`.
        widths: Channels at each resolution.
        may_lack_modalities: Whether the network was trained with missing modalities.
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
        """Return a randomly initialized network."""
        return build_network(self.network, len(self.modalities), 1 + len(self.regions), self.widths)

    def masks(
        self, probability: NDArray[np.float32], decision: Decision, spacing: Sequence[float] | None
    ) -> NDArray[np.bool_]:
        """Return the masks of the regions, probability [R, X, Y, Z] → bool [R, X, Y, Z].

        `spacing` holds the sides of the voxels in mm; None for the network's own grid.
        """
        size = 1.0 if self.spacing is None or spacing is None else math.prod(spacing) / self.spacing**3
        return decision.masks(probability, self.values, self.activation, size)

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> NetworkConfig:
        """Restore what `dataclasses.asdict` returned, after JSON.

        Raises:
            TypeError, ValueError: if fields are missing, unknown or invalid.
        """

        def frozen(value: Any) -> Any:
            return tuple(frozen(part) for part in value) if isinstance(value, list | tuple) else value

        network_config = cls(**{name: frozen(value) for name, value in fields.items()})
        if network_config.network not in NETWORKS:
            raise ValueError(f"network {network_config.network!r}")
        if network_config.activation not in ACTIVATIONS:
            raise ValueError(f"activation {network_config.activation!r}")
        modalities, regions, values = network_config.modalities, network_config.regions, network_config.values
        # Exports write modalities where MONAI looks for code.
        if not modalities or not all(isinstance(name, str) and name.isalnum() for name in modalities):
            raise ValueError(f"modalities {modalities!r}")
        # Regions become parts of file names.
        if not regions or any(not isinstance(name, str) or structure(name) != name for name in regions):
            raise ValueError(f"regions {regions!r}")
        if len(values) != len(regions) or not all(
            isinstance(of_region, tuple) and of_region and all(type(value) is int for value in of_region)
            for of_region in values
        ):
            raise ValueError(f"values {values!r}")
        spacing, patch = network_config.spacing, network_config.patch
        if spacing is not None and not (type(spacing) in (int, float) and 0 < spacing < 1000):
            raise ValueError(f"spacing {spacing!r}")
        stride = NETWORKS[network_config.network].stride
        if len(patch) != 3 or any(
            type(side) is not int or side % stride or not 2 * stride <= side <= _MAX_PATCH for side in patch
        ):
            raise ValueError(f"patch {patch!r}")
        return network_config


class Member(NamedTuple):
    """One network of a posterior.

    Args:
        network: Plain network; its own weights at the sites of `guide` are unused.
        guide: q over its kernels; None for a deterministic network, all samples of which are equal.
    """

    network: nn.Module
    guide: MeanFieldNormal | None


class Posterior:
    """q(W), an equal mixture of members: networks of one architecture, each with its own weights.

    Args:
        network_config: Architecture and input of the networks.
        members: Members, at least one; set to evaluation mode, without gradients.
        decision: How masks follow from its predictions.
    """

    def __init__(self, network_config: NetworkConfig, members: Sequence[Member], decision: Decision = _HALF) -> None:
        self.network_config = network_config
        self.decision = decision
        self.members = tuple(members)
        for member in self.members:
            member.network.eval().requires_grad_(False)
        # A network without weights, which come with each call: a thread may draw from a member at the same time.
        with torch.device("meta"):
            self._skeleton = network_config.build().eval()

    def draw(self, seed: int, member: int = 0) -> dict[str, Tensor]:
        """Return all weights of a member, its kernels one sample that depends on the seed alone."""
        network, guide = self.members[member]
        kernels = {} if guide is None else guide.draw(torch.Generator().manual_seed(seed))
        return {**network.state_dict(), **kernels}

    def means(self, member: int = 0) -> dict[str, Tensor]:
        """Return all weights of a member, its kernels at their posterior means."""
        network, guide = self.members[member]
        return {**network.state_dict(), **({} if guide is None else guide.means())}

    def logits(self, image: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, 1 + R, X, Y, Z] of an image [B, channels, X, Y, Z] for weights of `draw` or `means`."""
        output: Tensor = functional_call(self._skeleton, dict(weights), (image,))
        return output

    def to(self, device: torch.device) -> Posterior:
        """Move to a device, in place."""
        for network, guide in self.members:
            network.to(device)
            if guide is not None:
                guide.to(device)
        return self

    def save(self, path: Path) -> None:
        """Write one safetensors file: the tensors, and the network config and the decision in its header."""
        tensors: dict[str, Tensor] = {}
        sites: list[list[str]] = []
        for number, (network, guide) in enumerate(self.members):
            means = {} if guide is None else guide.means()
            sites.append(list(means))
            deterministic = {name: value for name, value in network.state_dict().items() if name not in means}
            tensors |= {f"{number}.network.{name}": value for name, value in deterministic.items()}
            if guide is not None:
                for site, mean in means.items():
                    tensors[f"{number}.loc.{site}"] = mean
                    tensors[f"{number}.scale.{site}"] = guide.scale(site)
                    tensors[f"{number}.unit.{site}"] = guide.unit(site)
        header = {"network": asdict(self.network_config), "decision": self.decision.to_mapping(), "sites": sites}
        save_tensors(path, tensors, {"format": FORMAT_VERSION, **header})

    @classmethod
    def load(cls, path: Path) -> Posterior:
        """Read what `save` wrote.

        Raises:
            RunError: if the file is missing, damaged, or has another format.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT_VERSION:
            raise RunError(
                f"{path}: has format {metadata.get('format')!r}, this version reads {FORMAT_VERSION}; train it again"
            )
        try:
            network_config = NetworkConfig.from_mapping(metadata["network"])
            if network_config.layout not in LAYOUTS:
                raise ValueError(f"layout {network_config.layout!r}")
            decision = Decision(**metadata["decision"])
            members = [
                _member(network_config, tensors, number, sites) for number, sites in enumerate(metadata["sites"])
            ]
            if not members:
                raise ValueError("no member")
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise RunError(f"{path}: does not hold a network of this version ({reason}); train it again") from problem
        return cls(network_config, members, decision)


def _member(network_config: NetworkConfig, tensors: Mapping[str, Tensor], number: int, sites: Sequence[str]) -> Member:
    means = {site: tensors[f"{number}.loc.{site}"] for site in sites}
    prefix = f"{number}.network."
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    with torch.device("meta"):  # wrong widths in a damaged config must not allocate memory
        shapes = {name: tensor.shape for name, tensor in network_config.build().state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in (plain | means).items()}:
        raise ValueError("its tensors do not fit its network config")
    network = network_config.build()
    fill_module(network, plain | means)
    if not means:
        return Member(network, None)
    units = {site: tensors[f"{number}.unit.{site}"] for site in means}
    for site, unit in units.items():
        size = means[site][0, 0].numel()
        diagonal = unit.diagonal() if unit.dim() == 2 else unit
        if unit.shape not in ((), (size,), (size, size)) or unit.dtype != means[site].dtype or not (diagonal > 0).all():
            raise ValueError(f"the unit of '{site}' does not fit its kernels")
    guide = MeanFieldNormal(means, units=units)
    for site, mean in means.items():
        scale = tensors[f"{number}.scale.{site}"]
        if (scale.shape, scale.dtype) != (mean.shape, mean.dtype) or not (scale > 0).all():
            raise ValueError(f"the standard deviations of '{site}' are not one positive number per weight")
        guide.set_scale(site, scale)
    return Member(network, guide)
