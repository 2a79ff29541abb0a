"""A kernel prior for the reader: its card, and pictures of what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dwp_pyro.distributions.kernel_prior import ANY_SITE, KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.report.comparison import Table
from dwp_pyro.report.figures import save_figure

__all__ = ["prior_card", "save_kernel_figure", "save_predictive_figure", "save_traversal_figure"]

_KERNELS_SHOWN = 16
_TRAVERSAL = torch.linspace(-3, 3, 13)
_DIMENSIONS_SHOWN = 3
_NOT_STATED = "not stated"


def prior_card(prior: KernelPrior) -> tuple[Table, Table]:
    """Where a prior comes from and what may be done with it; and how good each block is.

    What an old prior, or one of foreign kernels, does not say is "not stated".
    """
    about = prior.provenance
    network = about.get("network")
    network = network if isinstance(network, dict) else {}
    spacing = network.get("spacing")
    trained, snapshots = about.get("bootstraps"), about.get("snapshots")
    rows = [
        ["source", _text(about.get("source"))],
        ["licence", _text(about.get("licence"))],
        ["layout of the scans", _text(about.get("dataset"))],
        # Priors made before there was a card say "modality", and no more about the network.
        ["modalities", _text(network.get("modalities") or about.get("modality"))],
        ["voxels", (f"{spacing} mm" if spacing else "as scanned") if network else _NOT_STATED],
        ["normalisation", _text(about.get("normalisation"))],
        ["widths of the network", _text(network.get("widths"))],
        ["source networks", f"{trained}, {snapshots} snapshots of them" if trained else _NOT_STATED],
        ["kernels", f"{sum(card.kernels for card in prior.cards.values())} in {len(prior.cards)} blocks"],
        ["file of the kernels", _text(about.get("kernels"))],
    ]
    names = list(dict.fromkeys(name for card in prior.cards.values() for name in card.nats_per_kernel))
    blocks = [
        [
            name,
            "every site" if ANY_SITE in card.sites else str(len(card.sites)),
            "×".join(map(str, prior.block(name).kernel_shape)),
            str(card.kernels),
            f"{float(prior.block(name).root_mean_square()):.4f}",
            *(f"{card.nats_per_kernel[nats]:.1f}" if nats in card.nats_per_kernel else "-" for nats in names),
        ]
        for name, card in prior.cards.items()
    ]
    header = ["block", "convolutions", "kernel", "kernels", "rms weight", *(name.replace("_", " ") for name in names)]
    return (
        Table(["kernel prior", prior.family], rows, "It holds kernels, and no image."),
        Table(
            header,
            blocks,
            "From the sixth column on: log-density of held-out kernels, nats a kernel; higher is better.",
        ),
    )


def _text(value: Any) -> str:
    if value is None:
        return _NOT_STATED
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def save_kernel_figure(path: Path, prior: KernelPrior, kernels: Mapping[str, Tensor]) -> None:
    """Draw, for each block, kernels it was fitted to, if there are any, above draws of its prior, on one colour scale.

    Args:
        path: of the picture.
        prior: to draw from.
        kernels: block → kernels [n, k₁, …, k_d].
    """
    generator = torch.Generator().manual_seed(0)
    figure, axes = _column_of_axes(len(prior.cards), 0.9 if kernels else 0.55)
    for number, (ax, name) in enumerate(zip(axes, prior.cards, strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            drawn = prior.block(name).rsample([_KERNELS_SHOWN])
        rows = {"prior": drawn}
        if name in kernels:
            real = kernels[name]
            chosen = real[torch.randperm(len(real), generator=generator)[:_KERNELS_SHOWN]]
            rows = {"real": chosen, **rows}
        _show_kernels(ax, name, rows)
    above = "above, kernels of the source networks; below, draws" if kernels else "draws"
    figure.suptitle(
        f"Convolution kernels by block, middle slices: {above} of the {prior.family} prior.\n"
        "Red is positive, blue negative, one scale a block."
        + (" A good prior's draws cannot be told from the real ones." if kernels else ""),
        fontsize=10,
    )
    save_figure(path, figure, dpi=110)


def save_traversal_figure(path: Path, prior: KernelPrior, usage: Mapping[str, Tensor], unit: str) -> None:
    """Draw, for each block of a VAE prior, the mean kernel of p(w|z) along its most used latent dimensions.

    Args:
        path: of the picture.
        prior: of the family "dwp".
        usage: block → how much each latent dimension is used, [L].
        unit: what that is measured in.
    """
    figure, axes = _column_of_axes(len(prior.cards), 1.3)
    for ax, (name, used) in zip(axes, usage.items(), strict=True):
        vae = prior.block(name)
        assert isinstance(vae, KernelVAE)
        rows = {}
        for dimension in used.argsort(descending=True)[:_DIMENSIONS_SHOWN].tolist():
            z = torch.zeros(len(_TRAVERSAL), vae.latent_size)
            z[:, dimension] = _TRAVERSAL
            with torch.no_grad():
                loc, _ = vae.decode(z)
                w = vae.loc + loc @ vae.scale_tril.T
            rows[f"z{dimension + 1}: {float(used[dimension]):.2f}"] = w.reshape(-1, *vae.kernel_shape)
        _show_kernels(ax, name, rows)
    figure.suptitle(
        "What the latent dimensions do: mean kernel of p(w|z), middle slice, from z = −3 (left) to 3 (right) along\n"
        f"one dimension, the others 0. Of each block the {_DIMENSIONS_SHOWN} most used, by {unit}; near 0: not used.",
        fontsize=10,
    )
    save_figure(path, figure, dpi=110)


def save_predictive_figure(
    path: Path, image: NDArray[np.float32], draws: Mapping[str, Sequence[NDArray[np.float32]]]
) -> None:
    """Draw what networks with random kernels make of a generated scan, before they have seen any label.

    Args:
        path: of the picture.
        image: the middle axial slice, [X, Y].
        draws: where kernels are drawn from → the probability map of each network, [X, Y].
    """
    columns = 3 + max(map(len, draws.values()))
    figure = Figure(figsize=(1.9 * columns, 2.35 * len(draws) + 0.7), layout="constrained")
    axes = figure.subplots(len(draws), columns, squeeze=False)
    for row, (source, maps) in zip(axes, draws.items(), strict=True):
        stack = np.stack(maps)
        mean = stack.mean(0)
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
        brain = image != 0
        reach = float(np.abs(stack[:, brain] - 0.5).max())
        panels = [
            ("the scan", image, "gray", None),
            *((f"network {number}", map_, "RdBu_r", (0.5 - reach, 0.5 + reach)) for number, map_ in enumerate(maps, 1)),
            ("mean", mean, "RdBu_r", (0.5 - reach, 0.5 + reach)),
            ("entropy of the mean (nats)", entropy, "magma", (float(entropy[brain].min()), float(np.log(2)))),
        ]
        for ax, (title, values, colours, limits) in zip(row, panels, strict=True):
            low, high = limits or (None, None)
            shown = ax.imshow(
                np.where(brain, values, np.nan).T[:, ::-1], cmap=colours, vmin=low, vmax=high, origin="lower"
            )
            ax.set_title(title, fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
            if limits:
                bar = figure.colorbar(shown, ax=ax, location="bottom", shrink=0.85, ticks=limits, format="%.4f")
                bar.ax.tick_params(labelsize=7)
        row[0].set_ylabel(source, fontsize=9)
    figure.suptitle(
        "Prior predictive: probability that networks without any training give a generated scan, middle axial "
        "slice.\nAbove and below differ in their 3×3×3 kernels alone. Colours stretch over what a row holds; "
        "no entropy is above ln 2 = 0.6931.",
        fontsize=10,
    )
    save_figure(path, figure, dpi=110)


def _column_of_axes(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height * rows + 0.8), layout="constrained")
    return figure, [ax for (ax,) in figure.subplots(rows, 1, squeeze=False)]


def _show_kernels(ax: Axes, block: str, rows: Mapping[str, Tensor]) -> None:
    """Rows of kernels [n, k₁, …, k_d] in one picture, on one colour scale."""
    top = max(float(kernels.abs().flatten().quantile(0.995)) for kernels in rows.values())
    slices = [kernels[:, kernels.shape[1] // 2] if kernels.dim() == 4 else kernels for kernels in rows.values()]
    height, width = slices[0].shape[1:]
    longest = max(map(len, slices))
    # A voxel of nothing between neighbours.
    mosaic = np.full((len(rows) * (height + 1) - 1, longest * (width + 1) - 1), np.nan)
    for row, kernels in enumerate(slices):
        for column, kernel in enumerate(kernels):
            y, x = row * (height + 1), column * (width + 1)
            mosaic[y : y + height, x : x + width] = kernel.numpy()
    ax.imshow(mosaic, cmap="RdBu_r", vmin=-top, vmax=top)
    ax.set_title(block, fontsize=9, loc="left")
    ax.set_yticks([row * (height + 1) + (height - 1) / 2 for row in range(len(rows))], list(rows), fontsize=8)
    ax.tick_params(length=0)
    ax.set_xticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
