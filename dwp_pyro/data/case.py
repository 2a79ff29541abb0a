"""A case: the files of one scanned person, read and checked against each other."""

from __future__ import annotations

import gzip
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.data.regions import IGNORE
from dwp_pyro.errors import DataError

__all__ = ["UNREADABLE", "Case", "Scan", "Volume", "read_case", "read_volume"]

# Tools that write the same grid differ by rounding; a real shift is larger.
_TOLERANCE_MM = 0.1

# Whole bodies at a millimetre have less; as float32 it is 4 GB.
_MOST_VOXELS = 10**9

# Deflate needs a bit more than a byte for a thousand (zlib's technical notes: 1032 to 1).
_MOST_DEFLATED = 1032

#: What nibabel raises on damaged headers and contents.
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
        id: its name in the data set, unique there.
        images: modality (flair, t1, t1ce, t2, …) → file.
        label: file of the label, where there is one.
        brain: file of the brain mask, where there is one; see `read_case` for cases without.
        channels: modality → its place in the file, from 0, where one four-dimensional file holds several.
        patient: Name of the patient, where several cases are visits of one; "" for a patient of one case.
    """

    id: str
    images: Mapping[str, Path]
    label: Path | None = None
    brain: Path | None = None
    channels: Mapping[str, int] = field(default_factory=dict)
    patient: str = ""


@dataclass(frozen=True)
class Volume:
    """A three-dimensional image on its grid.

    Args:
        data: [X, Y, Z], float32.
        affine: [4, 4], voxel indices → scanner coordinates in mm (RAS+), as in nibabel.
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Side of a voxel along each axis, in mm."""
        return _spacing(self.affine)


@dataclass(frozen=True)
class Scan:
    """A case in memory: images [C, X, Y, Z], brain and label [X, Y, Z] on one grid.

    Args:
        id: of the case.
        images: float32, one channel a modality.
        brain: bool.
        label: int16 label values, where the case has a label.
        affine: [4, 4], as in `Volume`.
        reference: the file whose grid this is.
        ignored: bool, voxels that loss and score leave out; None for none.
    """

    id: str
    images: NDArray[np.float32]
    brain: NDArray[np.bool_]
    label: NDArray[np.int16] | None
    affine: NDArray[np.float64]
    reference: Path = field(compare=False)
    ignored: NDArray[np.bool_] | None = None

    @property
    def counted(self) -> NDArray[np.bool_]:
        """The brain, without what loss and score leave out."""
        return self.brain if self.ignored is None else self.brain & ~self.ignored

    @property
    def spacing(self) -> tuple[float, ...]:
        """Side of a voxel along each axis, in mm."""
        return _spacing(self.affine)


def _spacing(affine: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(side) for side in np.linalg.norm(affine[:3, :3], axis=0))


def read_volume(path: Path, channel: int | None = None) -> Volume:
    """Read a NIfTI file.

    Args:
        path: of the file.
        channel: of a four-dimensional file, to be read alone; the file is then one of several modalities.

    Raises:
        DataError: if it is missing, damaged, not three-dimensional (or has no such channel), holds NaN or infinity,
            or has a singular affine.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; put it there, or leave the case out") from None
    except OSError as problem:  # a link that goes in circles, no permission
        raise DataError(f"{path}: cannot be read ({problem.strerror}); mend that, or leave the case out") from problem
    try:
        image: Any = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image) or image.get_data_dtype().kind not in "iuf":
            raise DataError(f"{path}: is not a NIfTI image of plain numbers; convert it to .nii.gz first")
        _check_size(path, image)
        shape = image.shape
        found = "×".join(map(str, shape))
        if channel is None and (len(shape) != 3 or min(shape) < 2):
            raise DataError(f"{path}: expected a three-dimensional volume, found {found}; split or convert it first")
        if channel is not None and (len(shape) != 4 or min(shape[:3]) < 2 or shape[3] <= channel):
            raise DataError(
                f"{path}: expected a four-dimensional file with {channel + 1} channels or more, as dataset.json "
                f"names them, found {found}; mend one of the two"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is infinite, and said below
            data = _voxels(path, image, channel)
    except UNREADABLE as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(f"{path}: cannot be read as NIfTI ({reason}); is the file whole?") from problem
    if not np.isfinite(data).all():
        raise DataError(f"{path}: holds NaN or infinite voxels; replace them first")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: its affine is singular or not finite; the header needs repair")
    return Volume(data, affine)


def _check_size(path: Path, image: Any) -> None:
    """Raise DataError for a header that promises what the file cannot hold, or memory cannot, before any is taken."""
    voxels = math.prod(image.shape)
    size = voxels * image.get_data_dtype().itemsize
    if path.suffix.casefold() == ".gz":
        size //= _MOST_DEFLATED
    if size > path.stat().st_size:
        raise DataError(f"{path}: its header promises {voxels:,} voxels, more than there can be; is the file whole?")
    if voxels > _MOST_VOXELS:
        raise DataError(f"{path}: holds {voxels:,} voxels, more than {_MOST_VOXELS:,}; crop or resample it first")


def _voxels(path: Path, image: Any, channel: int | None) -> NDArray[np.float32]:
    """The voxels of an image, or of a channel of it. A compressed file is read to its end, where its checksum is."""
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
    """Read a case, all of its files on one grid.

    Args:
        case: its files.
        modalities: the channels, in order.
        labels: label value → structure; "ignore" marks voxels that loss and score leave out.
        may_lack_modalities: whether a modality that the case has not is a channel of zeros; one it must have.

    Raises:
        DataError: naming the file, if one is missing, damaged, or lies on another grid, if a label holds a
            fraction or a value that has no name, or if the brain is empty or ignored as a whole.
    """
    missing = [name for name in modalities if name not in case.images]
    if missing and not (may_lack_modalities and len(missing) < len(modalities)):
        raise DataError(
            f"case {case.id}: has no {missing[0]} scan (it has {', '.join(case.images)}); add the file, leave the "
            "case out, choose another --modality, or train with --modality-dropout"
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
    if case.brain is None:
        # Air within the head, and dark fluid within a brain, belong to it.
        brain = ndimage.binary_fill_holes((stack != 0).any(0))
    else:
        mask = read_volume(case.brain)
        _check_same_grid(mask, case.brain, first, reference)
        brain = mask.data > 0
    if not brain.any():
        raise DataError(f"{case.brain or reference}: has no voxel above 0; the case has no brain to look at")
    label = None if case.label is None else _read_label(case.label, labels, first, reference)
    ignore = [value for value, name in labels.items() if name == IGNORE]
    ignored = np.isin(label, ignore) if label is not None and ignore else None
    scan = Scan(case.id, stack, brain, label, first.affine, reference, ignored)
    if not scan.counted.any():
        raise DataError(f"{case.label}: every voxel of the brain is labelled '{IGNORE}'; leave the case out")
    return scan


def _read_label(path: Path, labels: Mapping[int, str], first: Volume, reference: Path) -> NDArray[np.int16]:
    volume = read_volume(path)
    _check_same_grid(volume, path, first, reference)
    whole = np.rint(volume.data)
    if not np.array_equal(whole, volume.data):
        raise DataError(f"{path}: label values are not whole numbers; was the mask resampled without 'nearest'?")
    unknown = sorted(set(np.unique(whole).tolist()) - {0, *labels})
    if unknown:
        known = ", ".join(f"{value} {name}" for value, name in {0: "background", **labels}.items())
        raise DataError(
            f"{path}: unknown label value {unknown[0]:.0f} ({known}); mend the mask, or name it by --label-map"
        )
    return whole.astype(np.int16)


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
