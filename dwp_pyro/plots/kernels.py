"""Plots of a prior: kernels, latent traversals, prior predictive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.plots.style import save_figure
from dwp_pyro.priors.kernel_prior import KernelPrior

__all__ = ["save_kernel_figure", "save_predictive_figure", "save_traversal_figure"]

_KERNELS_SHOWN = 16

_TRAVERSAL = torch.linspace(-3, 3, 13)

_DIMENSIONS_SHOWN = 3
_KERNELS_DRAWN = 1000


def save_kernel_figure(path: Path, prior: KernelPrior, kernels: Mapping[str, Tensor]) -> None:
    """Draw, per block, the `kernels` [n, k₁, …, k_d] it was fitted to, if any, above draws from the prior.

    Each block has one color scale.
    """
    generator = torch.Generator().manual_seed(0)
    figure, axes = _column_of_axes(len(prior.block_infos), 0.9 if kernels else 0.55)
    for number, (ax, name) in enumerate(zip(axes, prior.block_infos, strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            drawn = prior.block(name).rsample([_KERNELS_SHOWN])
        rows = {"prior": drawn}
        if name in kernels:
            real = kernels[name]
            chosen = real[torch.randperm(len(real), generator=generator)[:_KERNELS_SHOWN]]
            rows = {"real": chosen, **rows}
        _show_kernels(ax, name, rows)
    shown = "kernels of the source networks above draws" if kernels else "draws"
    figure.suptitle(
        f"Convolution kernels by block, middle slices: {shown} from the {prior.family} prior.\n"
        "Red is positive, blue negative; one scale per block."
        + (" Draws from a good prior look like the real ones." if kernels else ""),
        fontsize=10,
    )
    save_figure(path, figure, dpi=110)


@torch.no_grad()
def save_traversal_figure(path: Path, prior: KernelPrior, kernels: Mapping[str, Tensor]) -> None:
    """Draw, per block of a VAE prior, the mean kernel of p(w|z) along its most used latent dimensions.

    The use is measured on the `kernels` [n, k₁, …, k_d] of each block, or without any on draws from the prior.
    """
    figure, axes = _column_of_axes(len(prior.block_infos), 1.3)
    for ax, name in zip(axes, prior.block_infos, strict=True):
        vae = prior.block(name)
        assert isinstance(vae, KernelVAE)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            used = vae.latent_divergence(kernels[name] if kernels else vae.rsample([_KERNELS_DRAWN]))
        rows = {}
        for dimension in used.argsort(descending=True)[:_DIMENSIONS_SHOWN].tolist():
            z = torch.zeros(len(_TRAVERSAL), vae.latent_size)
            z[:, dimension] = _TRAVERSAL
            w = vae.loc + vae.decode(z)[0] @ vae.scale_tril.T
            rows[f"z{dimension + 1}: {float(used[dimension]):.2f}"] = w.reshape(-1, *vae.kernel_shape)
        _show_kernels(ax, name, rows)
    figure.suptitle(
        "Latent traversals: mean kernel of p(w|z), middle slice, from z = −3 (left) to 3 (right) along\n"
        f"one dimension, the others 0. The {_DIMENSIONS_SHOWN} most used dimensions per block, by mean "
        "KL(r(z|w)‖p(z)) in nats; 0: not used.",
        fontsize=10,
    )
    save_figure(path, figure, dpi=110)


def save_predictive_figure(
    path: Path, image: NDArray[np.float32], draws: Mapping[str, Sequence[NDArray[np.float32]]]
) -> None:
    """Draw the predictions of untrained networks for a generated scan.

    `image` is the middle axial slice, [X, Y]; `draws` has the probability maps [X, Y] per source of the kernels.
    """
    columns = 3 + max(map(len, draws.values()))
    figure = Figure(figsize=(1.9 * columns, 2.35 * len(draws) + 0.7), layout="constrained")
    axes = figure.subplots(len(draws), columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for row, (source, maps) in zip(axes, draws.items(), strict=True):
        stack = np.stack(maps)
        mean = stack.mean(0)
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
        brain_mask = image != 0
        reach = float(np.abs(stack[:, brain_mask] - 0.5).max())
        panels = [
            ("the scan", image, "gray", None),
            *((f"network {number}", map_, "RdBu_r", (0.5 - reach, 0.5 + reach)) for number, map_ in enumerate(maps, 1)),
            ("mean", mean, "RdBu_r", (0.5 - reach, 0.5 + reach)),
            ("entropy of the mean (nats)", entropy, "magma", (float(entropy[brain_mask].min()), float(np.log(2)))),
        ]
        for ax, (title, values, colors, limits) in zip(row, panels, strict=True):
            low, high = limits or (None, None)
            shown = ax.imshow(
                np.where(brain_mask, values, np.nan).T[:, ::-1], cmap=colors, vmin=low, vmax=high, origin="lower"
            )
            ax.set_title(title, fontsize=9)
            if limits:
                bar = figure.colorbar(shown, ax=ax, location="bottom", shrink=0.85, ticks=limits, format="%.4f")
                bar.ax.tick_params(labelsize=7)
        row[0].set_ylabel(source, fontsize=9)
    figure.suptitle(
        "Prior predictive: probability by untrained networks for a generated scan, middle axial slice.\n"
        "The rows differ in their 3×3×3 kernels only. Color scales are per row; entropy is at most ln 2 = 0.6931.",
        fontsize=10,
    )
    save_figure(path, figure, dpi=110)


def _column_of_axes(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height * rows + 0.8), layout="constrained")
    return figure, [ax for (ax,) in figure.subplots(rows, 1, squeeze=False, subplot_kw={"xticks": []})]


def _show_kernels(ax: Axes, block: str, rows: Mapping[str, Tensor]) -> None:
    """Draw rows of kernels [n, k₁, …, k_d] as a mosaic on one color scale."""
    top = max(float(kernels.abs().flatten().quantile(0.995)) for kernels in rows.values())
    slices = [kernels[:, kernels.shape[1] // 2] if kernels.dim() == 4 else kernels for kernels in rows.values()]
    height, width = slices[0].shape[1:]
    longest = max(map(len, slices))
    # One empty pixel between neighbors.
    mosaic = np.full((len(rows) * (height + 1) - 1, longest * (width + 1) - 1), np.nan)
    for row, kernels in enumerate(slices):
        for column, kernel in enumerate(kernels):
            y, x = row * (height + 1), column * (width + 1)
            mosaic[y : y + height, x : x + width] = kernel.numpy()
    ax.imshow(mosaic, cmap="RdBu_r", vmin=-top, vmax=top)
    ax.set_title(block, fontsize=9, loc="left")
    ax.set_yticks([row * (height + 1) + (height - 1) / 2 for row in range(len(rows))], list(rows), fontsize=8)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
