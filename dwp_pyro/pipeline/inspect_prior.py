"""`inspect-prior`: a prior's card, and pictures of its kernels, its latent space and what networks of it see."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.data.case import read_case
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.data.transforms import Preprocessing
from dwp_pyro.distributions.kernel_prior import ANY_SITE, KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.errors import PriorError
from dwp_pyro.models.blocks import kernel_sites, prior_blocks
from dwp_pyro.models.likelihoods import region_probability
from dwp_pyro.models.networks import NETWORKS, build_network
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.pipeline.collect_kernels import read_kernels
from dwp_pyro.progress import message, progress
from dwp_pyro.report.comparison import Table
from dwp_pyro.report.prior import prior_card, save_kernel_figure, save_predictive_figure, save_traversal_figure

__all__ = ["Inspection", "inspect_prior"]

_NETWORKS = 4


class Inspection(NamedTuple):
    """What was found: the card, and the pictures by what they show."""

    card: tuple[Table, Table]
    pictures: dict[str, Path]


def inspect_prior(prior: Path, out: Path) -> Inspection:
    """Describe and draw a prior.

    Writes `kernels.png`: draws beside the kernels that the prior was fitted to, if `kernels.safetensors` lies with it;
    `traversals.png`, of VAEs alone: mean kernels along the most used latent dimensions; and `predictive.png`, where the
    prior fits a network of the source's form: what networks with kernels drawn from it make of a generated scan,
    beside such at their random start; all other weights are at their initialisation in both.

    Args:
        prior: folder of a kernel prior.
        out: folder of the pictures; those of a former call are replaced.

    Raises:
        PriorError: if the prior, or the kernels beside it, cannot be read.
    """
    kernel_prior = KernelPrior.load(prior)
    kernels = _kernels(prior / "kernels.safetensors", kernel_prior)
    networks = _networks(kernel_prior)
    pictures = {}
    with progress("drawing", 3 + sum(map(len, networks.values()))) as advance:
        pictures["Kernels"] = out / "kernels.png"
        save_kernel_figure(pictures["Kernels"], kernel_prior, kernels)
        advance("kernels")
        if kernel_prior.family == "dwp":
            pictures["Latent dimensions"] = out / "traversals.png"
            measure = "mean KL(r(z|w)‖p(z)), in nats" if kernels else "the decoder's information on z"
            save_traversal_figure(pictures["Latent dimensions"], kernel_prior, _usage(kernel_prior, kernels), measure)
        advance("latent dimensions")
        if networks:
            image, channels = _phantom()
            draws: dict[str, list[NDArray[np.float32]]] = {source: [] for source in networks}
            for source, members in networks.items():
                for network in members:
                    probability = _probability(network, channels)
                    draws[source].append(probability[..., probability.shape[-1] // 2].numpy())
                    advance("networks")
            pictures["Prior predictive"] = out / "predictive.png"
            save_predictive_figure(pictures["Prior predictive"], image, draws)
        advance("networks")
    return Inspection(prior_card(kernel_prior), pictures)


def _kernels(path: Path, prior: KernelPrior) -> dict[str, Tensor]:
    """Block → the kernels it was fitted to; empty if they were not shared."""
    if not path.exists():
        return {}
    bank = read_kernels(path)
    found = {
        name: [values for site, values in bank.kernels.items() if site in card.sites or ANY_SITE in card.sites]
        for name, card in prior.cards.items()
    }
    if not all(found.values()):
        raise PriorError(f"{path}: has no kernels of some blocks of the prior beside it; remove it, or restore it")
    return {name: torch.cat(values) for name, values in found.items()}


def _usage(prior: KernelPrior, kernels: dict[str, Tensor]) -> dict[str, Tensor]:
    usage = {}
    for name in prior.cards:
        vae = prior.block(name)
        assert isinstance(vae, KernelVAE)
        usage[name] = vae.latent_divergence(kernels[name]) if kernels else vae.latent_information()
    return usage


def _networks(prior: KernelPrior) -> dict[str, list[nn.Module]]:
    """Where their kernels are drawn from → untrained networks, alike but for those; none if the prior does not fit."""
    networks: dict[str, list[nn.Module]] = {f"{prior.family} prior": [], "random start": []}
    for seed in range(_NETWORKS):
        for filled, members in zip((True, False), networks.values(), strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = _network(prior).eval()
                if filled:
                    try:
                        prior.at_sites(prior_blocks(network)).fill(kernel_sites(network))
                    except PriorError as problem:
                        message(f"No prior predictive: {problem}")
                        return {}
            members.append(network)
    return networks


def _network(prior: KernelPrior) -> nn.Module:
    """Of the form of the source networks, where the prior says, for one modality and one region."""
    match prior.provenance.get("network"):
        case {"widths": [int(a), int(b), int(c), int(d)], **form} if min(a, b, c, d) > 0 and max(a, b, c, d) <= 1024:
            kind = form.get("network", "residual-unet")
            if kind in NETWORKS:
                return build_network(kind, 1, 2, (a, b, c, d))
    return ResidualUNet3d(1, 2)


@torch.no_grad()
def _probability(network: nn.Module, image: Tensor) -> Tensor:
    """Image [1, X, Y, Z] → probability of the one region, [X, Y, Z]; sides are padded to what every network takes."""
    stride = max(kind.stride for kind in NETWORKS.values())
    sides = [(0, -side % stride) for side in reversed(image.shape[1:])]
    logits = network(F.pad(image[None], list(itertools.chain(*sides))))
    x, y, z = image.shape[1:]
    return region_probability(logits, "sigmoid")[0, 0, :x, :y, :z]


def _phantom() -> tuple[NDArray[np.float32], Tensor]:
    """A generated FLAIR scan: its middle axial slice [X, Y], and itself ready for a network [1, X, Y, Z]."""
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms("brats", Path(folder), 1)
        data = open_dataset(Path(folder), "brats")
        scan = read_case(data.cases[0], ("flair",), data.labels)
    image = Preprocessing(None)(scan, []).image.as_tensor()
    return image[0, ..., image.shape[-1] // 2].numpy(), image
