"""Scans to tensors and back: MONAI pipelines for training, for inference, and to the scan's own grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CropForegroundd,
    Invertd,
    MaskIntensityd,
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    Spacingd,
    SpatialPadd,
)
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dwp_pyro.data.case import Scan
from dwp_pyro.errors import DataError

__all__ = ["AXES", "NORMALISATION", "Batch", "Example", "Patches", "Preprocessing", "patch_shape"]

#: What `Preprocessing` does to the intensities, for those who have to do it elsewhere.
NORMALISATION = (
    "each channel clipped to its percentiles 0.5 and 99.5 over the brain, then mean 0 and variance 1 there; 0 outside"
)
_CLIPPED = (0.5, 99.5)

#: Axes that can be mirrored, of a volume in RAS orientation.
AXES = ("x", "y", "z")

_ROTATED, _SHEARED, _SCALED = 0.3, 0.1, 0.2  # radians, and fractions, at most
_THICKNESS = (0.5, 1.5)  # standard deviation in voxels

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Example:
    """A case ready for the network, cropped to its brain.

    Args:
        id: of the case.
        image: [C, X, Y, Z], normalised over the brain, 0 outside.
        brain: [1, X, Y, Z], 0 outside, 1 inside; 2 inside where the label says that loss and score leave a voxel out.
        label: [R, X, Y, Z], 1 in a region and 0 outside; None without a label.
        indices: Flat indices of the brain's voxels outside all regions, then of each region's voxels; () without a
            label.
    """

    id: str
    image: MetaTensor
    brain: MetaTensor
    label: MetaTensor | None
    indices: tuple[Tensor, ...]


class Preprocessing:
    """Orientation to RAS, spacing, crop to the brain, normalisation over the brain; and the way back.

    Args:
        spacing: side of the cubic voxels to resample to, in mm; None keeps those of the scan.
    """

    def __init__(self, spacing: float | None) -> None:
        keys = ("image", "brain", "label")
        resample = []
        if spacing is not None:
            resample = [
                Spacingd(keys, (spacing,) * 3, mode=("bilinear", "nearest", "nearest"), allow_missing_keys=True)
            ]
        self._transform = Compose(
            [
                *resample,
                MaskIntensityd("image", mask_key="brain"),
                CropForegroundd(keys, "brain", allow_smaller=True, allow_missing_keys=True),
            ]
        )
        self._indices = ClassesToIndicesd("classes", image_key="brain")

    def __call__(self, scan: Scan, regions: Sequence[frozenset[int]]) -> Example:
        """Args: a scan, and of each region to segment the label values that make it up; no regions, no label.

        Raises:
            DataError: if the brain has fewer than two voxels.
        """
        arrays: dict[str, NDArray[Any]] = {
            "image": scan.images,
            "brain": (2 * scan.brain.astype(np.float32) - scan.counted)[None],
        }
        if scan.label is not None and regions:
            masks = np.stack([np.isin(scan.label, sorted(values)) for values in regions])
            arrays["label"] = masks.astype(np.float32)
        turn = _to_ras(scan)
        affine = torch.from_numpy(scan.affine @ inv_ornt_aff(turn, scan.brain.shape))
        volumes = {name: MetaTensor(_turned(array, turn), affine=affine) for name, array in arrays.items()}
        # Cropped views keep the whole scan in memory; copies do not. Masks take a byte a voxel.
        cropped = self._transform(volumes)
        done: Any = {
            name: (cropped[name] if name == "image" else cropped[name].to(torch.uint8)).clone() for name in volumes
        }
        voxels = int((done["brain"] > 0).sum())
        if voxels < 2:  # a patch of one has no contrast to augment
            raise DataError(
                f"{scan.reference}: the brain of case {scan.id} has {voxels} voxels on the network's grid, too few to "
                "look at; mend the mask, or give a smaller --spacing"
            )
        _normalize(done["image"], done["brain"][0] > 0)
        if "label" not in done:
            return Example(scan.id, done["image"], done["brain"], None, ())
        label = done["label"].as_tensor()
        classes = torch.cat([1 - label.amax(0, keepdim=True), label])
        found = self._indices({"classes": classes, "brain": done["brain"].as_tensor()})["classes_cls_indices"]
        indices = tuple(torch.as_tensor(place).int() for place in found)
        return Example(scan.id, done["image"], done["brain"], done["label"], indices)

    def invert(self, maps: Tensor, example: Example, scan: Scan) -> NDArray[np.float32]:
        """Maps [M, X, Y, Z] on an example's grid → [M, X, Y, Z] on the scan's own, by trilinear interpolation.

        Voxels outside the scan's brain are 0.
        """
        # Maps have taken the way of the image; its record is what MONAI inverts.
        carrier = MetaTensor(maps.cpu().float(), meta=example.image.meta)
        carrier.applied_operations = example.image.applied_operations
        back = Invertd("maps", self._transform, orig_keys="image", nearest_interp=False, to_tensor=True)
        inverted = back({"image": example.image, "maps": carrier})["maps"]
        turn_back = ornt_transform(_RAS, _to_ras(scan))
        return _turned(np.asarray(inverted, dtype=np.float32), turn_back) * scan.brain


def _normalize(image: Tensor, brain: Tensor) -> None:
    """Normalize in place, see `NORMALISATION`; a channel that is constant over the brain becomes 0 there.

    Args:
        image: Channels [C, X, Y, Z], 0 outside the brain.
        brain: Mask [X, Y, Z].
    """
    for channel in image:
        inside = channel[brain].double()
        low, high = np.percentile(inside.numpy(), _CLIPPED)
        inside = inside.clamp(low, high)
        channel[brain] = ((inside - inside.mean()) / (inside.std(correction=0) or 1)).to(channel.dtype)


# MONAI's Orientation looks anew, on the way back, which axis is which; of a scan that is turned by 45° that may come
# out the other way, and the maps with their axes exchanged.
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


def _to_ras(scan: Scan) -> NDArray[Any]:
    """nibabel's orientation that brings a scan's axes nearest to right, anterior, superior."""
    turn: NDArray[Any] = io_orientation(scan.affine)
    return turn


def _turned(volumes: NDArray[Any], orientation: NDArray[Any]) -> NDArray[Any]:
    """Volumes [C, X, Y, Z] with their axes exchanged and mirrored."""
    with_channels = np.vstack([[0, 1], orientation + np.array([1, 0])])
    return np.ascontiguousarray(apply_orientation(volumes, with_channels))


def patch_shape(examples: Sequence[Example], side: int, stride: int) -> tuple[int, int, int]:
    """Shape of a training patch: `side` voxels, but no larger than the examples.

    Args:
        examples: to take patches of.
        side: in voxels.
        stride: of the network's deepest features, in voxels: sides are multiples of it, two at least.
    """
    largest = [max(example.image.shape[1 + axis] for example in examples) for axis in range(3)]
    x, y, z = (max(2, min(math.ceil(side / stride), math.ceil(n / stride))) * stride for n in largest)
    return x, y, z


class Patches(Dataset[Batch]):
    """An endless training set as a function of position: patch i is the same whoever asks, and whenever.

    Each round of the examples is a new permutation; patch i is drawn and augmented with the seed
    (seed, i). Stopping and resuming, or loading by other processes, therefore changes nothing.

    Half of the patches are centred on a region, each as often as the others, half on the rest of the brain.
    Augmentation: mirrored axes; rotation, scaling and shear; what another scanner would change: gamma, contrast,
    brightness, resolution, thickness of slices, noise.

    Args:
        examples: labelled examples, at least one.
        shape: patch shape [x, y, z]; smaller examples are padded with 0.
        seed: of everything random here.
        length: number of patches.
        modality_dropout: probability with which a modality is all 0, one staying that the case has.
        mirror: Axes along which half of the patches are mirrored, of `AXES`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        shape: tuple[int, int, int],
        seed: int,
        length: int,
        modality_dropout: float = 0.0,
        mirror: Sequence[str] = ("x",),
    ) -> None:
        self.examples = list(examples)
        self.seed = seed
        self.length = length
        self.modality_dropout = modality_dropout
        keys = ("image", "label", "brain")
        # A case that lacks a region has its patches at the others as often as at the background.
        self._crops = {
            present: RandCropByLabelClassesd(
                keys,
                "label",
                shape,
                ratios=[sum(present) or 1, *present],
                num_classes=1 + len(present),
                indices_key="indices",
                allow_smaller=True,
                warn=False,  # of cases without some region
            )
            for present in {_present(example) for example in self.examples}
        }
        flips = [RandFlipd(keys, prob=0.5, spatial_axis=AXES.index(axis)) for axis in mirror]
        self._transform = Compose(
            [
                SpatialPadd(keys, shape),
                *flips,
                RandAffined(
                    keys,
                    prob=0.5,
                    rotate_range=(_ROTATED,) * 3,
                    shear_range=(_SHEARED,) * 6,
                    scale_range=(_SCALED,) * 3,
                    mode=("bilinear", "nearest", "nearest"),
                    padding_mode="reflection",
                ),
                RandAdjustContrastd("image", prob=0.5, gamma=(0.5, 2.0), retain_stats=True),
                RandScaleIntensityd("image", factors=0.3, prob=1.0),
                RandShiftIntensityd("image", offsets=0.3, prob=1.0),
                RandSimulateLowResolutiond("image", prob=0.2, zoom_range=(0.5, 1.0)),
                OneOf([_thick_slices(axis) for axis in range(3)]),
                RandGaussianNoised("image", prob=0.3, std=0.15),
                MaskIntensityd("image", mask_key="brain"),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        """Image [C, x, y, z], label [R, x, y, z], and 1 where a voxel counts [1, x, y, z]."""
        round_, place = divmod(index, len(self.examples))
        order = np.random.default_rng([self.seed, round_]).permutation(len(self.examples))
        example = self.examples[order[place]]
        assert example.label is not None
        transform = Compose([self._crops[_present(example)], self._transform])
        transform.set_random_state(seed=int(np.random.default_rng([self.seed, index, 1]).integers(2**31)))
        with _without_meta():
            (patch,) = transform(
                {
                    "image": example.image.as_tensor(),
                    "label": example.label.as_tensor(),
                    "brain": example.brain.as_tensor(),
                    "indices": list(example.indices),
                }
            )
        image, label, brain = (patch[key] for key in ("image", "label", "brain"))
        if self.modality_dropout:
            image = image * self._kept(index, example)[:, None, None, None]
        return image, label.long(), (brain == 1).float()

    def _kept(self, index: int, example: Example) -> Tensor:
        """1 for the modalities that stay in a patch, 0 for the others, [C]; noise has been added to all of them."""
        random = np.random.default_rng([self.seed, index, 2])
        there = example.image.as_tensor().flatten(1).any(1).numpy()
        kept = there & (random.random(len(there)) >= self.modality_dropout)
        if there.any() and not kept.any():
            kept[random.choice(np.flatnonzero(there))] = True
        return torch.from_numpy(kept).float()


def _present(example: Example) -> tuple[int, ...]:
    """1 for each region that the example has and 0 for the others, of R regions."""
    return tuple(int(len(region) > 0) for region in example.indices[1:])


def _thick_slices(axis: int) -> RandGaussianSmoothd:
    """Blur along one axis, as of thick slices, in a fifth of the calls."""
    sigmas: dict[str, Any] = {
        f"sigma_{name}": _THICKNESS if number == axis else (0.0, 1e-6) for number, name in enumerate(AXES)
    }
    return RandGaussianSmoothd("image", prob=0.2, **sigmas)


@contextmanager
def _without_meta() -> Iterator[None]:
    """Without a record of where voxels came from, which a patch does not need and which costs a third of its time."""
    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)
