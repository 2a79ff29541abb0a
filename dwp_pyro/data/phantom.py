"""Generated brain scans with multiple sclerosis or a tumor, in the layouts of real data sets.

An ellipsoidal brain is scaled, rotated and warped at random, folded by the zero set of a random field, and given
ventricles and deep gray matter. Voxels hold *fractions* of tissues, so that edges have partial volume. A scan is the
brightness of the tissues with a bias field, blur and noise. The two data sets have different scanners and heads.

Lengths are in mm of a head that fills the grid (at the default shape a voxel is 3 mm). Axes point right, front and up
(RAS) from its center.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.runtime.errors import DataError
from dwp_pyro.runtime.files import atomic_path, new_folder
from dwp_pyro.runtime.progress import each

__all__ = ["write_phantoms"]

Array = NDArray[np.float64]
Tissues = dict[str, Array]  # name → fraction in each voxel, [x, y, z]; the fractions sum to 1
Shape = tuple[int, int, int]

_FIELD = (144.0, 168.0, 144.0)  # extent of the head, in mm

# Ellipsoids as (|x|, y, z) of the center and three radii, in mm. Later parts replace earlier ones where they overlap
# and keep their own cortex, which forms the Sylvian fissure and the tentorium.
_PARTS = {
    "cerebrum": (0, 0, 8, 61, 74, 54),
    "temporal": (38, 8, -22, 21, 40, 20),
    "cerebellum": (19, -42, -36, 30, 27, 20),
    "stem": (0, -17, -40, 11, 12, 25),
}
_DEEP_GRAY = {"caudate": (14, 18, 12, 5, 12, 9), "putamen": (26, 5, 2, 7, 17, 10), "thalamus": (11, -14, 5, 9, 13, 9)}
_VENTRICLES = {"third": (0, -8, 0, 2, 12, 9), "fourth": (0, -36, -34, 5, 5, 7)}

# Brightness in flair, t1, t1ce and t2, as a fraction of the scanner's gain.
_BRIGHTNESS = {
    "white": (0.50, 0.80, 0.82, 0.44),
    "gray": (0.63, 0.58, 0.61, 0.62),
    "deep": (0.57, 0.66, 0.69, 0.54),
    "csf": (0.20, 0.25, 0.27, 1.00),
    "vessel": (0.25, 0.30, 1.05, 0.30),
    "spot": (0.90, 0.54, 0.57, 0.82),
    "oedema": (0.95, 0.56, 0.58, 0.88),
    "enhancing": (0.80, 0.58, 1.45, 0.74),
    "necrosis": (0.55, 0.34, 0.37, 0.92),
}
_PATHOLOGY = ("spot", "oedema", "enhancing", "necrosis")


@dataclass(frozen=True)
class _Layout:
    """File names and scanner of a data set."""

    folder: str  # format of a case folder, relative to the root
    modalities: tuple[str, str, str, str]  # endings of the files of flair, t1, t1ce and t2
    label: str  # ending of the label file
    gamma: float  # exponent of the brightness
    noise: float  # standard deviation, as a fraction of the gain
    blur: float  # standard deviation, in voxels
    bias: float  # standard deviation of the logarithm of the bias field


_LAYOUTS = {
    "ms": _Layout("patient{:02d}", ("FLAIR", "T1W", "T1WKS", "T2W"), "consensus_gt", 1.2, 0.03, 0.45, 0.06),
    "brats": _Layout("HGG/Brats18_PHA_{:03d}_1", ("flair", "t1", "t1ce", "t2"), "seg", 0.9, 0.035, 0.6, 0.08),
}


def write_phantoms(
    dataset: Literal["ms", "brats"],
    out: Path,
    cases: int,
    seed: int = 0,
    shape: Shape = (48, 56, 48),
    spacing: float = 3.0,
) -> list[str]:
    """Write generated cases in the layout of open_ms_data (``"ms"``) or BraTS 2018 (``"brats"``).

    A case has four skull-stripped scans (FLAIR, T1, T1 with contrast agent, T2), int16, above 0 in the brain and
    0 outside, and a uint8 label: 1 for an MS lesion; or 1, 2, 4 for necrosis, oedema and enhancing tumor. Case i is a
    function of dataset, seed, i and shape alone, so that a larger data set begins with the smaller one. The folder
    of a case is written atomically.

    Args:
        dataset: Disease, layout and scanner.
        out: Root of the data set; created if missing.
        cases: Number of cases, at least 1.
        seed: Seed, at least 0.
        shape: Number of voxels along each axis [x, y, z]; the head fills the grid.
        spacing: Side of a voxel in the affine, in mm; it does not change the voxels.

    Returns:
        Ids of the cases, in order; they are the names of their folders.

    Raises:
        DataError: if the folder of a case exists; nothing is written.
    """
    folders = [out / _LAYOUTS[dataset].folder.format(i + 1) for i in range(cases)]
    if existing := [path for path in folders if os.path.lexists(path)]:
        raise DataError(f"{existing[0]}: exists already and is not overwritten; choose another folder")
    for i, folder in enumerate(each(folders, f"{dataset} scans")):
        rng = np.random.default_rng([seed, i, list(_LAYOUTS).index(dataset)])
        volumes = _case(dataset, rng, shape)
        with new_folder(folder) as unfinished:
            for name, volume in volumes.items():
                with atomic_path(unfinished / f"{folder.name}_{name}.nii.gz") as path:
                    nib.save(_image(dataset, volume, spacing), path)
    return [folder.name for folder in folders]


def _image(dataset: str, volume: NDArray[np.generic], spacing: float) -> nib.Nifti1Image:
    """Return a volume [x, y, z] in RAS as an image with the orientation of the real data set (LPS for BraTS)."""
    if dataset == "brats":
        affine = np.diag([-spacing, -spacing, spacing, 1])
        affine[1, 3] = spacing * (volume.shape[1] - 1)
        volume = volume[::-1, ::-1]
    else:
        affine = np.diag([spacing, spacing, spacing, 1])
        affine[:3, 3] = -spacing * (np.array(volume.shape) - 1) / 2
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def _case(dataset: str, rng: np.random.Generator, shape: Shape) -> dict[str, NDArray[np.generic]]:
    """Return the volumes of one case, [x, y, z] in RAS, by the ending of their files."""
    layout = _LAYOUTS[dataset]
    voxel = max(field / n for field, n in zip(_FIELD, shape, strict=True))
    where, depth = _head(rng, shape, voxel)
    if dataset == "ms":
        tissues, to_ventricle = _tissues(rng, where, depth, voxel)
        spots = _spots(rng, tissues, to_ventricle, int(rng.integers(3, 16)), voxel)
        _paint(tissues, "spot", spots)
        label = (spots > 0.5).astype(np.uint8)
    else:
        center, radius = _tumor_position(rng, where, depth)
        tissues, to_ventricle = _tissues(rng, _push(where, center, radius), depth, voxel)
        _paint(tissues, "spot", _spots(rng, tissues, to_ventricle, int(rng.integers(2, 7)), voxel))
        label = _grow_tumor(rng, tissues, where - center, radius, voxel)
    brain_mask = depth > 0
    scans = _scan(rng, tissues, brain_mask, layout, voxel)
    volumes: dict[str, NDArray[np.generic]] = dict(zip(layout.modalities, scans, strict=True))
    volumes[layout.label] = label * brain_mask
    if dataset == "ms":
        volumes["brainmask"] = brain_mask.astype(np.uint8)
    return volumes


# ---------------------------------------------------------------------------------------------- anatomy


def _smooth(rng: np.random.Generator, shape: Shape, sigma: float) -> Array:
    """Return a random field with mean 0 and variance 1, smoothed by FFT with a Gaussian of `sigma` voxels."""
    spectrum = ndimage.fourier_gaussian(np.fft.rfftn(rng.standard_normal(shape)), sigma, n=shape[-1])
    field: Array = np.fft.irfftn(spectrum, shape)
    standardized: Array = (field - field.mean()) / field.std()
    return standardized


def _above(value: Array, width: float) -> Array:
    """Return 1 for positive and 0 for negative values, with a ramp of a given width between (partial volume)."""
    return np.clip(0.5 + value / width, 0, 1)


def _ellipsoid(where: Array, center_radii: tuple[float, ...]) -> Array:
    """Return the approximate depth in mm, [x, y, z], in an ellipsoid and its mirror image; negative outside."""
    x, y, z, *radii = center_radii
    offset = (np.abs(where[0]) - x, where[1] - y, where[2] - z)
    level: Array = np.sqrt(sum((o / r) ** 2 for o, r in zip(offset, radii, strict=True)))
    return (1 - level) * min(radii)


def _head(rng: np.random.Generator, shape: Shape, voxel: float) -> tuple[Array, Array]:
    """Return the positions in the standard head, [3, x, y, z] in mm, and the depth in the brain, [x, y, z] in mm."""
    axes = [(np.arange(n) - (n - 1) / 2) * voxel for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    deformation = np.diag(rng.uniform(0.93, 1.05, 3)) + 0.025 * rng.standard_normal((3, 3))
    where = np.tensordot(deformation, grid, 1)
    where += np.stack([2.0 * _smooth(rng, shape, 22 / voxel) for _ in range(3)])
    depth = np.full(shape, -np.inf)
    for part, ellipsoid in _PARTS.items():
        inside = _ellipsoid(where, ellipsoid)
        if part == "cerebrum":  # flat base
            inside = np.minimum(inside, where[2] + 32)
        depth = np.where(inside > 0, inside, np.maximum(depth, inside))
    return where, depth


def _tissues(rng: np.random.Generator, where: Array, depth: Array, voxel: float) -> tuple[Tissues, Array]:
    """Return the tissues of a healthy head and the distance from the lateral ventricles, [x, y, z] in mm."""
    x, y, z = where
    shape = depth.shape
    # Sulci, up to 15 mm deep, are the zero set of a smooth field; |field| × 4.5 mm approximates the distance from it.
    # The hemispheres are separate at x = 0 except in the callosum and below.
    sulcus = 4.5 * np.abs(_smooth(rng, shape, 5 / voxel)) + np.maximum(depth - 15, 0)
    bridge = _ellipsoid(where, (0, -4, -6, 40, 46, 32))
    pia = np.minimum(np.minimum(depth, sulcus), np.abs(x) + np.maximum(bridge, 0))
    pia = np.where(_ellipsoid(where, _PARTS["stem"]) > 0, np.inf, pia)

    tissues: Tissues = {"white": np.ones(shape)}
    _paint(tissues, "gray", _above(3.4 - pia, voxel))
    csf = _above(0.7 - pia, voxel)
    _paint(tissues, "csf", csf)
    _paint(tissues, "vessel", csf * _above(_smooth(rng, shape, 4 / voxel) - 1.6, 1.0))
    for ellipsoid in _DEEP_GRAY.values():
        _paint(tissues, "deep", _above(_ellipsoid(where, ellipsoid), voxel))
    # The horns of the lateral ventricles diverge and descend.
    horns = np.stack([np.abs(x) - 0.009 * y**2, y, z + 0.008 * y**2])
    size = rng.uniform(0.8, 1.5)
    lateral = _ellipsoid(horns, (8, -4, 17, 5.5 * size, 36, 8 * size))
    for inside in (lateral, *(_ellipsoid(where, e) for e in _VENTRICLES.values())):
        _paint(tissues, "csf", _above(inside, voxel))
    return tissues, -lateral


def _paint(tissues: Tissues, name: str, fraction: Array) -> None:
    """Add a fraction [x, y, z] of a tissue in place, and scale the other tissues by the rest."""
    for other in tissues:
        tissues[other] = tissues[other] * (1 - fraction)
    tissues[name] = tissues.get(name, 0) + fraction


# -------------------------------------------------------------------------------------------- pathology


def _spots(rng: np.random.Generator, tissues: Tissues, to_ventricle: Array, count: int, voxel: float) -> Array:
    """Return the fraction [x, y, z] of small white-matter lesions, most of them beside the ventricles."""
    shape = to_ventricle.shape
    weight = tissues["white"] ** 4 * (np.exp(-np.maximum(to_ventricle, 0) / 7) + 0.01)
    ripple = 1 + 0.2 * _smooth(rng, shape, 4 / voxel)
    axes = np.indices(shape) * voxel
    fraction = np.zeros(shape)
    for flat in rng.choice(weight.size, count, p=weight.ravel() / weight.sum()):
        offset = axes - np.array(np.unravel_index(flat, shape))[:, None, None, None] * voxel
        stretch = rng.uniform(0.65, 1.35, 3)[:, None, None, None]
        radius = np.clip(rng.lognormal(np.log(4.5), 0.35), 2.5, 10) * ripple
        fraction = np.maximum(fraction, _above(radius - np.linalg.norm(offset / stretch, axis=0), voxel))
    return fraction * (1 - tissues["csf"])


def _tumor_position(rng: np.random.Generator, where: Array, depth: Array) -> tuple[Array, float]:
    """Return the center of a tumor in a hemisphere, [3, 1, 1, 1] in mm, and the radius of its oedema in mm."""
    hemispheres = (depth > 10) & (np.abs(where[0]) > 12) & (where[2] > -15)
    center = where[:, *np.unravel_index(rng.choice(np.flatnonzero(hemispheres)), depth.shape)]
    return center[:, None, None, None], float(np.exp(rng.uniform(np.log(10), np.log(34))))


def _push(where: Array, center: Array, radius: float) -> Array:
    """Return the positions, [3, x, y, z] in mm, before the tumor displaced the tissue around it."""
    offset = where - center
    source: Array = where - 0.45 * offset * np.exp(-0.5 * (offset**2).sum(0) / (0.6 * radius) ** 2)
    return source


def _grow_tumor(
    rng: np.random.Generator, tissues: Tissues, offset: Array, radius: float, voxel: float
) -> NDArray[np.uint8]:
    """Add a tumor to the tissues in place and return its label, [x, y, z], with the values of BraTS 2018.

    `offset` is that from the center of the tumor, [3, x, y, z], and `radius` that of the oedema; all lengths in mm.
    """
    shape = offset.shape[1:]
    distance = np.linalg.norm(offset / rng.uniform(0.75, 1.25, 3)[:, None, None, None], axis=0)
    rough, fine = _smooth(rng, shape, radius / 2.5 / voxel), _smooth(rng, shape, 3.5 / voxel)
    # Oedema spreads along white matter. Neither oedema nor tumor fills the ventricles.
    space = 1 - tissues["csf"] * (tissues["csf"] > 0.6)
    core_radius = radius * rng.uniform(0.4, 0.75)
    rim = rng.uniform(0.15, 0.45) * core_radius + 0.5 * voxel
    oedema = radius * (0.85 + 0.3 * rough + 0.1 * fine + 0.4 * (tissues["white"] - 0.5)) - distance
    core = core_radius * (1 + 0.2 * rough + 0.15 * fine) - distance
    necrosis = core - rim * (1 + 0.35 * fine)
    label = np.zeros(shape, np.uint8)
    for name, value, inside, width in (
        ("oedema", 2, oedema, 2.5 * voxel),
        ("enhancing", 4, core, voxel),
        ("necrosis", 1, necrosis, voxel),
    ):
        fraction = _above(inside, width) * space
        _paint(tissues, name, fraction)
        label[fraction > 0.5] = value
    return label


# ---------------------------------------------------------------------------------------------- scanner


def _scan(
    rng: np.random.Generator, tissues: Tissues, brain_mask: NDArray[np.bool_], layout: _Layout, voxel: float
) -> list[NDArray[np.int16]]:
    """Return flair, t1, t1ce and t2, each [x, y, z] and 0 outside of the brain, with a random gain per scan."""
    shape = brain_mask.shape
    strength = {name: rng.uniform(0.5, 1.0) if name in _PATHOLOGY else 1.0 for name in tissues}
    texture = 1 + 0.03 * _smooth(rng, shape, 2.5 / voxel)
    scans = []
    for modality in range(4):
        brightness = np.zeros(shape)
        for name, fraction in tissues.items():
            # Interpolate faint lesions to white matter.
            own, white = _BRIGHTNESS[name][modality], _BRIGHTNESS["white"][modality]
            brightness += (white + strength[name] * (own - white)) * rng.normal(1, 0.03) * fraction
        bias = np.exp(layout.bias * _smooth(rng, shape, 35 / voxel))
        clean = ndimage.gaussian_filter((brightness * texture) ** layout.gamma, layout.blur) * bias
        noisy = clean + layout.noise * rng.standard_normal(shape)
        gain = np.exp(rng.uniform(np.log(200), np.log(1500)))
        scans.append((np.maximum(np.rint(gain * noisy), 1) * brain_mask).astype(np.int16))
    return scans
