"""Write copies of the source scans of the package in simulated heads, and a manifest and a split of all scans.

$ python studies/pretrained/scans.py DATA data/pretrained

DATA has the folders real/ms, openms and semisynthetic/ms. The scans are skull-stripped, and a target may have whole
heads. A head is a dark layer for the skull and the fluid around the brain, and a layer of random brightness for the
scalp, both of random thickness. Two copies are made of each real scan, and one of each of 12 semi-synthetic ones. Every
scan counts as a patient, so that a bootstrap draws as many scans as there are. Four further semi-synthetic scans, of
the same two brains, validate.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]

Scan = tuple[str, Path, Path]  # id, FLAIR, mask

_PAD = 22.0  # mm around the scan: with its own margin, room for 26 mm of skull and scalp


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    mslesseg = [
        (folder.name, folder / "flair.nii.gz", folder / "lesion.nii.gz")
        for folder in sorted((data / "real" / "ms").glob("mslesseg*"))
    ]
    real = [*mslesseg, *(_patient(folder) for folder in sorted((data / "openms").glob("patient*")))]
    synthetic, held_out = (
        [_patient(data / "semisynthetic" / "ms" / f"patient{number:03d}", "semisynthetic-") for number in numbers]
        for numbers in (range(1, 13), range(45, 49))
    )
    heads = [
        _with_head(scan, np.random.default_rng([number, copy]), out / f"{scan[0]}-head{copy}")
        for scans, copies in ((real, 2), (synthetic, 1))
        for number, scan in enumerate(scans)
        for copy in range(copies)
    ]
    train = [*real, *synthetic, *heads]
    with open(out / "scans.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "flair", "label"))
        writer.writerows((name, flair.resolve(), label.resolve()) for name, flair, label in (*train, *held_out))
    split = {role: [name for name, _, _ in scans] for role, scans in (("train", train), ("validation", held_out))}
    (out / "split.json").write_text(json.dumps(split | {"test": []}, indent=2))


def _patient(folder: Path, prefix: str = "") -> Scan:
    return prefix + folder.name, *(folder / f"{folder.name}_{end}.nii.gz" for end in ("FLAIR", "consensus_gt"))


def _with_head(scan: Scan, random: np.random.Generator, out: Path) -> Scan:
    """Write a scan in a simulated head, and its mask."""
    _, flair, label = scan
    image = nibabel.load(flair)
    spacing = np.array(image.header.get_zooms()[:3], float)
    pad = np.ceil(_PAD / spacing).astype(int)
    affine = image.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ pad
    head = simulate_head(image.get_fdata(), spacing, random, pad)
    mask = np.pad(np.asarray(nibabel.load(label).dataobj) > 0, [(n, n) for n in pad])
    out.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(head.astype(np.float32), affine), out / "flair.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), affine), out / "lesion.nii.gz")
    return out.name, out / "flair.nii.gz", out / "lesion.nii.gz"


def simulate_head(image: Array, spacing: Array, random: np.random.Generator, pad: NDArray[np.int64]) -> Array:
    """Return a skull-stripped scan within layers of skull and scalp.

    Args:
        image: Scan, above 0 in the brain [X, Y, Z].
        spacing: Sides of a voxel, in mm [3].
        random: Source of random numbers.
        pad: Voxels to add at each end of an axis [3].

    Returns:
        Scan with the added voxels, 0 outside the head [X + 2 pad₁, Y + 2 pad₂, Z + 2 pad₃].
    """
    image = np.pad(image, [(n, n) for n in pad])
    parts, _ = ndimage.label(ndimage.binary_fill_holes(ndimage.binary_closing(image > 0, iterations=2)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # the background
    brain = parts == sizes.argmax()
    distance = ndimage.distance_transform_edt(~brain, sampling=spacing)
    median = np.median(image[brain])

    def field(mm: float) -> Array:
        return _smooth_field(image.shape, spacing, mm, random)

    skull = np.clip(random.uniform(4, 9) * (1 + 0.25 * field(40)), 2, 12)
    scalp = np.clip(random.uniform(4, 10) * (1 + 0.3 * field(40)), 2, 14)
    in_skull = median * random.uniform(0.1, 0.5) * np.exp(0.2 * field(12))
    in_scalp = median * random.uniform(0.5, 2.0) * np.exp(0.25 * field(15))
    head = distance <= skull + scalp
    around = np.where(head, np.where(distance <= skull, in_skull, in_scalp), 0)
    around = ndimage.gaussian_filter(np.where(brain, 0, around), 0.7 / spacing)
    around += np.abs(random.normal(0, median * random.uniform(0.01, 0.05), image.shape)) * head
    around[distance > skull + scalp + 2] = 0
    return np.where(brain, image, around)


def _smooth_field(shape: tuple[int, ...], spacing: Array, mm: float, random: np.random.Generator) -> Array:
    """Return Gaussian noise on a grid of at most `mm`, interpolated by cubic splines; mean 0, variance 1."""
    coarse = np.ceil(np.array(shape) * spacing / mm).astype(int) + 3
    field = ndimage.zoom(random.standard_normal(coarse), np.array(shape) / coarse, order=3)
    return (field - field.mean()) / field.std()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
