"""Cases: the files of one scan, read and checked for consistency."""

from __future__ import annotations

import gzip
import itertools
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.data.regions import IGNORE
from dwp_pyro.runtime.errors import DataError, LabelsUnknown

__all__ = ["MAX_VOXELS", "UNREADABLE", "Case", "Scan", "Volume", "read_case", "read_volume"]

# Tools round the same affine differently; a real shift is larger.
_TOLERANCE_MM = 0.1
_QUANTIZATION = 0.02  # error of label values stored with a scale factor

#: 4 GB as float32; whole-body scans at 1 mm are smaller.
MAX_VOXELS = 10**9

# Limit of deflate (zlib Technical Details: 1032 to 1).
_MAX_COMPRESSION = 1032

#: Exceptions that nibabel raises for damaged files.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    MemoryError,
    OverflowError,
    zlib.error,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.spatialimages.HeaderTypeError,
)


@dataclass(frozen=True)
class Case:
    """Files of one case.

    Args:
        id: Name, unique in the data set.
        images: Modality (flair, t1, t1ce, t2, …) → file.
        label: Label file, if any.
        brain_mask: Brain mask file, if any; `read_case` describes the fallback.
        channels: Modality → channel index in its file, from 0, if one four-dimensional file has several modalities.
        patient: Name of the patient if several cases may be visits of one patient; otherwise "".
    """

    id: str
    images: Mapping[str, Path]
    label: Path | None = None
    brain_mask: Path | None = None
    channels: Mapping[str, int] = field(default_factory=dict)
    patient: str = ""

    def __str__(self) -> str:
        return f"case {self.id}"

    def files(self, modalities: Sequence[str], *, label: bool) -> tuple[Path, ...]:
        """Return the files of these modalities, the brain mask and, on request, the label; none twice."""
        images = [self.images[name] for name in modalities if name in self.images]
        others = (self.brain_mask, self.label if label else None)
        return tuple(dict.fromkeys([*images, *(path for path in others if path is not None)]))


@dataclass(frozen=True)
class Volume:
    """Three-dimensional image and its grid.

    Args:
        data: Voxels [X, Y, Z], float32.
        affine: Affine [4, 4], voxel indices → scanner coordinates in mm (RAS+), as in nibabel.
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Scan:
    """Case in memory, all arrays on one grid.

    Args:
        id: Id of the case.
        images: Images [C, X, Y, Z], float32, one channel per modality.
        brain_mask: Brain mask [X, Y, Z].
        label: Label values [X, Y, Z], int32; None without a label.
        affine: Affine [4, 4], as in `Volume`.
        reference: File that defines the grid.
        ignored: Mask [X, Y, Z] of voxels that loss and metrics ignore; None if there are none.
    """

    id: str
    images: NDArray[np.float32]
    brain_mask: NDArray[np.bool_]
    label: NDArray[np.int32] | None
    affine: NDArray[np.float64]
    reference: Path = field(compare=False)
    ignored: NDArray[np.bool_] | None = None

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Brain mask without the ignored voxels."""
        return self.brain_mask if self.ignored is None else self.brain_mask & ~self.ignored

    @property
    def spacing(self) -> tuple[float, ...]:
        """Side of a voxel along each axis, in mm."""
        return tuple(map(float, nibabel.affines.voxel_sizes(self.affine)))

    def mask(self, values: Collection[int]) -> NDArray[np.bool_]:
        """Return the voxels [X, Y, Z] of a labeled scan that have one of these label values."""
        assert self.label is not None
        return np.isin(self.label, list(values))


def read_volume(path: Path, channel: int | None = None) -> Volume:
    """Read a NIfTI file.

    Args:
        path: NIfTI file.
        channel: Channel to read from a four-dimensional file; None for a three-dimensional file, whose further axes
            have length 1.

    Raises:
        DataError: if the file is missing or damaged, has the wrong number of dimensions or channels, holds NaN or
            infinity, or has a singular affine.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; add it or exclude the case") from None
    except OSError as problem:  # circular link, no permission
        raise DataError(f"{path}: cannot be read ({problem.strerror}); fix that or exclude the case") from problem
    try:
        image: Any = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image) or image.get_data_dtype().kind not in "iuf":
            raise DataError(f"{path}: is not a NIfTI image of plain numbers; convert it to .nii.gz first")
        _check_size(path, image)
        shape = image.shape
        found = "×".join(map(str, shape))
        if channel is None and (len(shape) < 3 or min(shape[:3]) < 2 or set(shape[3:]) - {1}):
            raise DataError(f"{path}: expected a three-dimensional volume, found {found}; split or convert it first")
        if channel is not None and (len(shape) != 4 or min(shape[:3]) < 2 or shape[3] <= channel):
            raise DataError(
                f"{path}: expected a four-dimensional file with {channel + 1} channels or more, as in dataset.json, "
                f"found {found}; fix one of the two"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # values beyond float32 become infinite
            data = _voxels(path, image, channel).reshape(shape[:3])
    except UNREADABLE as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(f"{path}: cannot be read as NIfTI ({reason}); is the file complete?") from problem
    if not np.isfinite(data).all():
        raise DataError(f"{path}: holds NaN or infinite voxels; replace them first")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: its affine is singular or not finite; the header needs repair")
    return Volume(data, affine)


def _check_size(path: Path, image: Any) -> None:
    """Raise DataError, before allocating memory, if the header states more voxels than file or memory can hold."""
    voxels = math.prod(image.shape)
    size = voxels * image.get_data_dtype().itemsize
    if path.suffix.casefold() == ".gz":
        size //= _MAX_COMPRESSION
    if size > path.stat().st_size:
        raise DataError(
            f"{path}: its header states {voxels:,} voxels, more than the file can hold; is the file complete?"
        )
    if voxels > MAX_VOXELS:
        raise DataError(f"{path}: holds {voxels:,} voxels, more than {MAX_VOXELS:,}; crop or resample it first")


def _voxels(path: Path, image: Any, channel: int | None) -> NDArray[np.float32]:
    """Return the voxels of an image or of one channel; read a compressed file to its end, to verify its checksum."""
    if path.suffix.casefold() != ".gz":
        return np.asarray(image.dataobj if channel is None else image.dataobj[..., channel], dtype=np.float32)
    with gzip.open(path) as file:
        whole: Any = type(image).from_stream(file)
        data = np.asarray(whole.dataobj if channel is None else whole.dataobj[..., channel], dtype=np.float32)
        while file.read(2**20):
            pass
    return data


def read_case(
    case: Case, modalities: Sequence[str], labels: Mapping[int, str], *, may_lack_modalities: bool = False
) -> Scan:
    """Read the files of a case and check that they share one grid.

    Without a brain mask, the brain is where any image is not 0, with holes filled.

    Args:
        case: Case to read.
        modalities: Modalities of the channels, in order.
        labels: Label value → structure; loss and metrics ignore voxels of "ignore".
        may_lack_modalities: Whether missing modalities become channels of zeros; at least one must exist.

    Raises:
        DataError: if a file is missing, damaged or on another grid, if the label has fractions or values without a
            name, or if the brain is empty or ignored completely.
    """
    missing = [name for name in modalities if name not in case.images]
    if missing and not (may_lack_modalities and len(missing) < len(modalities)):
        raise DataError(
            f"case {case.id}: has no {missing[0]} scan (it has {', '.join(case.images)}); add the file, exclude "
            "the case, choose other modalities, or train with modality dropout"
        )
    first_name = next(name for name in modalities if name in case.images)
    reference = case.images[first_name]
    first = read_volume(reference, case.channels.get(first_name))
    stack = np.zeros((len(modalities), *first.data.shape), np.float32)
    for plane, name in zip(stack, modalities, strict=True):
        if name in case.images:
            volume = first if name == first_name else read_volume(case.images[name], case.channels.get(name))
            _check_same_grid(volume, case.images[name], first, reference)
            plane[:] = volume.data
    if case.brain_mask is None:
        # Air cavities in the head and dark fluid in the brain are 0, too.
        brain_mask = ndimage.binary_fill_holes((stack != 0).any(0))
    else:
        mask = read_volume(case.brain_mask)
        _check_same_grid(mask, case.brain_mask, first, reference)
        brain_mask = mask.data > 0
    if not brain_mask.any():
        raise DataError(f"{case.brain_mask or reference}: has no voxel above 0; the brain of the case is empty")
    label = None if case.label is None else _read_label(case.label, labels, first, reference)
    ignore = [value for value, name in labels.items() if name == IGNORE]
    ignored = np.isin(label, ignore) if label is not None and ignore else None
    scan = Scan(case.id, stack, brain_mask, label, first.affine, reference, ignored)
    if not scan.counted.any():
        raise DataError(f"{case.label}: every voxel of the brain is labeled '{IGNORE}'; exclude the case")
    return scan


def _read_label(path: Path, labels: Mapping[int, str], first: Volume, reference: Path) -> NDArray[np.int32]:
    volume = read_volume(path)
    _check_same_grid(volume, path, first, reference)
    whole = np.rint(volume.data)
    if np.abs(whole - volume.data).max() > _QUANTIZATION:
        raise DataError(f"{path}: label values are not whole numbers; was the mask resampled without 'nearest'?")
    unknown = sorted(set(np.unique(whole).tolist()) - {0, *labels})
    if unknown:
        known = ", ".join(f"{value} {name}" for value, name in {0: "background", **labels}.items())
        raise LabelsUnknown(f"{path}: unknown label value {unknown[0]:.0f} ({known}); fix the mask or name the value")
    return whole.astype(np.int32)


def _check_same_grid(volume: Volume, path: Path, first: Volume, reference: Path) -> None:
    if volume.data.shape != first.data.shape:
        found, expected = "×".join(map(str, volume.data.shape)), "×".join(map(str, first.data.shape))
        raise DataError(f"{path}: has {found} voxels, but {reference.name} has {expected}; resample one to the other")
    corners = np.array([*itertools.product(*((0, side - 1) for side in first.data.shape))])
    apart = np.linalg.norm(apply_affine(volume.affine, corners) - apply_affine(first.affine, corners), axis=1)
    if apart.max() > _TOLERANCE_MM:
        raise DataError(
            f"{path}: its affine differs from that of {reference.name}, by up to {apart.max():.1f} mm; "
            "resample or repair one"
        )
