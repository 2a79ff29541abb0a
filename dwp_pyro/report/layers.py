"""What a viewer shows of a case: image, truth, prediction and maps, each a small NIfTI file on the scan's own grid."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from numpy.typing import NDArray

from dwp_pyro.report.figures import COLOURS, largest_section, shown_region

__all__ = ["CaseView", "Layer", "case_view"]

_LEVELS = 255  # of an image's voxel, stored as a byte
_MAP_LEVELS = 100  # of a map's: told apart in hundredths, it takes three quarters of the bytes


@dataclass(frozen=True)
class Layer:
    """One volume of a viewer.

    Args:
        title: what it is.
        unit: of its values; "" where they have none.
        colours: name of a colour map of matplotlib, or one colour as #rrggbb.
        low: value with the first colour of the map, below which nothing is told apart.
        high: value with the last colour.
        hidden: part of the scale, from below, that is transparent.
        shown: from the start.
        opacity: from the start, 0 to 1.
        nifti: a .nii.gz file of bytes, scaled so that readers see the values.
    """

    title: str
    unit: str
    colours: str
    low: float
    high: float
    hidden: float
    shown: bool
    opacity: float
    nifti: bytes


@dataclass(frozen=True)
class CaseView:
    """A case in a viewer.

    Args:
        layers: the image first, what lies above it after.
        focus: where its crosshair starts, in mm (RAS+): the region's largest sections.
    """

    layers: tuple[Layer, ...]
    focus: tuple[float, float, float]


def case_view(
    modality: str,
    affine: NDArray[np.float64],
    image: NDArray[np.float32],
    brain: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    probability: NDArray[np.float32],
    entropy: NDArray[np.float32],
    mutual_information: NDArray[np.float32],
) -> CaseView:
    """The layers of a case: all volumes are [X, Y, Z] on one grid, and cropped to the brain and the regions.

    A voxel of the image is told apart in 255 steps between the percentiles 0.2 and 99.8, one of a map in 100 steps
    between 0 and the highest possible value or, for mutual information, the highest there is.

    Args:
        modality: of the image.
        affine: [4, 4], voxel indices → mm (RAS+).
        image: the scan.
        brain: its brain.
        truth: the true region.
        predicted: The predicted region.
        probability: of the region.
        entropy: of the prediction, in nats.
        mutual_information: of prediction and weights, in nats.
    """
    box = _bounding_box(brain | truth | predicted)
    affine_of_box = affine @ from_matvec(np.eye(3), [side.start for side in box])
    most = max(float(mutual_information.max()), 1e-3)
    low, high = (float(level) for level in np.percentile(image[box], [0.2, 99.8]))

    def layer(
        title: str,
        volume: NDArray[Any],
        colours: str,
        high: float,
        *,
        low: float = 0.0,
        hidden: float = 0.1,
        levels: int = _MAP_LEVELS,
        unit: str = "",
        shown: bool = False,
        opacity: float = 0.7,
    ) -> Layer:
        nifti = _encode(volume[box], affine_of_box, low, high, levels)
        return Layer(title, unit, colours, low, high, hidden, shown, opacity, nifti)

    layers = (
        layer(
            modality,
            image,
            "gray",
            max(high, low + 1e-6),
            low=low,
            hidden=0.0,
            levels=_LEVELS,
            shown=True,
            opacity=1.0,
        ),
        layer("truth", truth, COLOURS[2], 1.0, hidden=0.5, shown=True, opacity=0.5),
        layer("prediction", predicted, COLOURS[1], 1.0, hidden=0.5, shown=True, opacity=0.5),
        layer("probability", probability, "viridis", 1.0),
        layer("entropy", entropy, "magma", float(np.log(2)), unit="nats"),
        layer("mutual information", mutual_information, "magma", most, unit="nats"),
    )
    region = shown_region(truth, predicted, probability)
    x, y, z = apply_affine(affine, [largest_section(region, axis) for axis in range(3)]).tolist()
    return CaseView(layers, (x, y, z))


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    sides = []
    for axis in range(3):
        there = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        sides.append(slice(int(there[0]), int(there[-1]) + 1))
    return tuple(sides)


def _encode(volume: NDArray[Any], affine: NDArray[np.float64], low: float, high: float, levels: int) -> bytes:
    step = (high - low) / levels
    image = nibabel.Nifti1Image(np.rint((np.clip(volume, low, high) - low) / step).astype(np.uint8), affine)
    image.header.set_slope_inter(step, low)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)
