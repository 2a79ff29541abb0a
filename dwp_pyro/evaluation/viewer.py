"""Layers of a case for a viewer: image, truth, prediction and maps, each a small NIfTI file on the scan's grid."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.plots.cases import largest_section, shown_region
from dwp_pyro.plots.style import COLORS

__all__ = ["CaseView", "Layer", "case_view"]

_LEVELS = 255  # of an image, stored as bytes
_MAP_LEVELS = 100  # of a map: steps of 0.01 compress to three quarters of the size


@dataclass(frozen=True)
class Layer:
    """One volume of a viewer.

    Args:
        title: Title.
        colors: Name of a matplotlib color map, or one color as #rrggbb.
        low: Value of the first color; lower values are clipped.
        high: Value of the last color; higher values are clipped.
        nifti: Content of a .nii.gz file of bytes, with slope and intercept of the values.
        unit: Unit of the values; "" if there is none.
        hidden: Fraction of the scale, from its lower end, that is transparent.
        shown: Whether the layer is visible at first.
        opacity: Opacity at first, 0 to 1.
    """

    title: str
    colors: str
    low: float
    high: float
    nifti: bytes
    unit: str = ""
    hidden: float = 0.1
    shown: bool = False
    opacity: float = 0.7


@dataclass(frozen=True)
class CaseView:
    """Case in a viewer.

    Args:
        layers: Layers from bottom to top; the image is first.
        focus: Initial position of the crosshair in mm (RAS+), in the largest sections of the region.
    """

    layers: tuple[Layer, ...]
    focus: tuple[float, float, float]


def case_view(
    modality: str,
    affine: NDArray[np.float64],
    image: NDArray[np.float32],
    brain_mask: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    probability: NDArray[np.float32],
    entropy: NDArray[np.float32],
    mutual_information: NDArray[np.float32],
) -> CaseView:
    """Return the layers of a case, cropped to the brain and the regions; all volumes are [X, Y, Z] on one grid.

    The image has 255 levels between its percentiles 0.2 and 99.8. A map has 100 levels from 0 to its largest possible
    value or, for mutual information, its largest value. Entropy and mutual information are in nats; the affine [4, 4]
    maps voxel indices to mm (RAS+).
    """
    (box,) = ndimage.find_objects((brain_mask | truth | predicted).view(np.uint8))
    affine_of_box = affine @ from_matvec(np.eye(3), [side.start for side in box])
    most = max(float(mutual_information.max()), 1e-3)
    low, high = np.percentile(image[box], [0.2, 99.8]).tolist()
    high = max(high, low + 1e-6)

    def layer(title: str, volume: NDArray[Any], colors: str, high: float, **more: Any) -> Layer:
        return Layer(title, colors, 0.0, high, _encode(volume[box], affine_of_box, 0.0, high, _MAP_LEVELS), **more)

    scan = _encode(image[box], affine_of_box, low, high, _LEVELS)
    layers = (
        Layer(modality, "gray", low, high, scan, hidden=0.0, shown=True, opacity=1.0),
        layer("truth", truth, COLORS[2], 1.0, hidden=0.5, shown=True, opacity=0.5),
        layer("prediction", predicted, COLORS[1], 1.0, hidden=0.5, shown=True, opacity=0.5),
        layer("probability", probability, "viridis", 1.0),
        layer("entropy", entropy, "magma", float(np.log(2)), unit="nats"),
        layer("mutual information", mutual_information, "magma", most, unit="nats"),
    )
    region = shown_region(truth, predicted, probability)
    x, y, z = apply_affine(affine, [largest_section(region, axis) for axis in range(3)]).tolist()
    return CaseView(layers, (x, y, z))


def _encode(volume: NDArray[Any], affine: NDArray[np.float64], low: float, high: float, levels: int) -> bytes:
    step = (high - low) / levels
    image = nibabel.Nifti1Image(np.rint((np.clip(volume, low, high) - low) / step).astype(np.uint8), affine)
    image.header.set_slope_inter(step, low)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)
