"""`inspect-prior`: pictures of the kernels, the latent space and the prior predictive of a prior."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.transforms import DivisiblePad
from numpy.typing import NDArray
from torch import Tensor, nn

from dwp_pyro.data.case import read_case
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.data.preprocessing import Preprocessing
from dwp_pyro.models.likelihoods import region_probability
from dwp_pyro.models.registry import NETWORKS, build_network
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.plots.kernels import save_kernel_figure, save_predictive_figure, save_traversal_figure
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.blocks import kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import ANY_SITE, KernelPrior
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.progress import progress

__all__ = ["inspect_prior"]

_logger = logging.getLogger(__name__)

_NETWORKS = 4


def inspect_prior(prior: Path, out: Path) -> tuple[KernelPrior, dict[str, Path]]:
    """Draw a prior; return it, and title → picture.

    Writes `kernels.png`: draws from the prior, and the kernels that it was fitted to if `kernels.safetensors` is in the
    folder; `traversals.png`, for VAEs only: mean kernels along the most used latent dimensions; and `predictive.png`,
    if the prior fits the source architecture: predictions for a generated scan by untrained networks whose kernels are
    drawn from the prior, and by networks at their random initialization. Earlier pictures in `out` are replaced.

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
            save_traversal_figure(pictures["Latent dimensions"], kernel_prior, kernels)
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
    return kernel_prior, pictures


def _kernels(path: Path, prior: KernelPrior) -> dict[str, Tensor]:
    """Return block → kernels it was fitted to; empty if the file is missing."""
    if not path.exists():
        return {}
    bank = read_kernels(path)
    found = {
        name: [values for site, values in bank.kernels.items() if site in info.sites or ANY_SITE in info.sites]
        for name, info in prior.block_infos.items()
    }
    if not all(found.values()):
        raise PriorError(f"{path}: lacks kernels of some blocks of the prior; remove or restore it")
    return {name: torch.cat(values) for name, values in found.items()}


def _networks(prior: KernelPrior) -> dict[str, list[nn.Module]]:
    """Return source of kernels → untrained networks that share all other weights; empty if the prior does not fit."""
    networks: dict[str, list[nn.Module]] = {f"{prior.family} prior": [], "random start": []}
    for seed in range(_NETWORKS):
        for filled, members in zip((True, False), networks.values(), strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = _network(prior).eval()
                if filled:
                    try:
                        prior.assign_sites(prior_blocks(network)).fill(kernel_sites(network))
                    except PriorError as problem:
                        _logger.warning("skipping the prior predictive: %s", problem)
                        return {}
            members.append(network)
    return networks


def _network(prior: KernelPrior) -> nn.Module:
    """Build the source architecture, if the prior records it, for one modality and one region."""
    match prior.provenance.get("network"):
        case {"widths": [int(a), int(b), int(c), int(d)], **form} if min(a, b, c, d) > 0 and max(a, b, c, d) <= 1024:
            kind = form.get("network", "residual-unet")
            if kind in NETWORKS:
                return build_network(kind, 1, 2, (a, b, c, d))
    return ResidualUNet3d(1, 2)


@torch.no_grad()
def _probability(network: nn.Module, image: Tensor) -> Tensor:
    """Return the probability [X, Y, Z] of the region in an image [1, X, Y, Z], padded to a stride of all networks."""
    stride = max(kind.stride for kind in NETWORKS.values())
    logits = network(DivisiblePad(stride, method="end")(image)[None])
    x, y, z = image.shape[1:]
    return region_probability(logits, "sigmoid")[0, 0, :x, :y, :z]


def _phantom() -> tuple[NDArray[np.float32], Tensor]:
    """Return the middle axial slice [X, Y] of a generated FLAIR scan, and its preprocessed image [1, X, Y, Z]."""
    with tempfile.TemporaryDirectory() as folder:
        write_phantoms("brats", Path(folder), 1)
        data = open_dataset(Path(folder), "brats")
        scan = read_case(data.cases[0], ("flair",), data.labels)
    image = Preprocessing(None)(scan, []).image.as_tensor()
    return image[0, ..., image.shape[-1] // 2].numpy(), image
