"""Preprocessing of scans to tensors on the network's grid, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import ClassesToIndicesd, Compose, CropForegroundd, Invertd, MaskIntensityd, Spacingd
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from torch import Tensor

from dwp_pyro.data.case import MAX_VOXELS, Scan
from dwp_pyro.runtime.errors import DataError

__all__ = ["AXES", "NORMALIZATION", "Example", "Preprocessing", "class_indices"]

#: Description of the intensity normalization, for model cards and exports.
NORMALIZATION = (
    "each channel clipped to its percentiles 0.5 and 99.5 over the brain, then mean 0 and variance 1 there; 0 outside"
)

_PERCENTILES = (0.5, 99.5)
_MIN_WEIGHT = 1e-3

#: Axes of a volume in RAS orientation.
AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Example:
    """Preprocessed case, cropped to its brain.

    Args:
        id: Id of the case.
        image: Channels [C, X, Y, Z], normalized over the brain, 0 outside.
        brain_mask: Mask [1, X, Y, Z]: 0 outside of the brain, 1 inside, 2 for ignored voxels inside.
        label: Masks of the regions [R, X, Y, Z]; None without a label.
        indices: Flat indices of the brain voxels outside of all regions, then of the voxels of each region; () without
            a label.
    """

    id: str
    image: MetaTensor
    brain_mask: MetaTensor
    label: MetaTensor | None
    indices: tuple[Tensor, ...]


class Preprocessing:
    """Orientation to RAS, resampling, crop to the brain, normalization over the brain; and the inverse.

    Args:
        spacing: Side of the cubic voxels to resample to, in mm; None keeps those of the scan.
    """

    def __init__(self, spacing: float | None) -> None:
        keys = ("image", "brain_mask", "label")
        transforms: list[Any] = [
            MaskIntensityd("image", mask_key="brain_mask"),
            CropForegroundd(keys, "brain_mask", allow_smaller=True, allow_missing_keys=True),
        ]
        if spacing is not None:
            modes = ("bilinear", "nearest", "nearest")
            transforms.insert(0, Spacingd(keys, (spacing,) * 3, mode=modes, allow_missing_keys=True))
        self._spacing = spacing
        self._transform = Compose(transforms)

    def __call__(self, scan: Scan, regions: Sequence[frozenset[int]]) -> Example:
        """Preprocess a scan.

        Args:
            scan: Scan.
            regions: Label values of each region; empty for an example without a label.

        Raises:
            DataError: if the brain has fewer than two voxels, or the scan too many.
        """
        volume = scan.brain_mask.size * abs(float(np.linalg.det(scan.affine[:3, :3])))  # mm³
        if self._spacing is not None and volume > MAX_VOXELS * self._spacing**3:
            raise DataError(
                f"{scan.reference}: would have more than {MAX_VOXELS:,} voxels of {self._spacing:g} mm; check the size "
                "of the voxels in its header, or train with a larger spacing"
            )
        arrays: dict[str, NDArray[Any]] = {
            "image": scan.images,
            "brain_mask": (2 * scan.brain_mask.astype(np.float32) - scan.counted)[None],
        }
        if scan.label is not None and regions:
            masks = np.stack([scan.mask(values) for values in regions])
            arrays["label"] = masks.astype(np.float32)
        orientation = io_orientation(scan.affine)
        affine = torch.from_numpy(scan.affine @ inv_ornt_aff(orientation, scan.brain_mask.shape))
        volumes = {name: MetaTensor(_reorient(array, orientation), affine=affine) for name, array in arrays.items()}
        transformed = self._transform(volumes)
        # Clone, because cropped views keep the whole scan in memory. Masks are stored as uint8.
        cropped: Any = {
            name: (transformed[name] if name == "image" else transformed[name].to(torch.uint8)).clone()
            for name in volumes
        }
        voxels = int((cropped["brain_mask"] > 0).sum())
        if voxels < 2:  # one voxel has no contrast to augment
            raise DataError(
                f"{scan.reference}: the brain of case {scan.id} has {voxels} voxels on the network's grid, expected at "
                "least 2; fix the mask or choose a smaller spacing"
            )
        _normalize(cropped["image"], cropped["brain_mask"][0] > 0)
        if "label" not in cropped:
            return Example(scan.id, cropped["image"], cropped["brain_mask"], None, ())
        indices = class_indices(cropped["label"], cropped["brain_mask"])
        return Example(scan.id, cropped["image"], cropped["brain_mask"], cropped["label"], indices)

    def invert(self, maps: Tensor, example: Example, scan: Scan) -> NDArray[np.float32]:
        """Resample maps from an example's grid to the scan's grid by trilinear interpolation; 0 outside of the brain.

        Args:
            maps: Maps [M, X, Y, Z] on the grid of the example.
            example: Preprocessed scan.
            scan: Scan that the example was made from.

        Returns:
            Maps [M, X, Y, Z] on the grid of the scan.
        """
        # Normalized interpolation: voxels beyond the crop have no map and no weight.
        with_weight = torch.cat([maps.cpu().float(), torch.ones(1, *maps.shape[1:])])
        # MONAI inverts the operations that are recorded in the image.
        carrier = MetaTensor(with_weight, meta=example.image.meta)
        carrier.applied_operations = example.image.applied_operations
        back = Invertd("maps", self._transform, orig_keys="image", nearest_interp=False, to_tensor=True)
        inverted = back({"image": example.image, "maps": carrier})["maps"]
        orientation = ornt_transform(_RAS, io_orientation(scan.affine))
        restored = _reorient(np.asarray(inverted, dtype=np.float32), orientation)
        result: NDArray[np.float32] = restored[:-1] / restored[-1].clip(_MIN_WEIGHT) * scan.brain_mask
        return result


def class_indices(label: MetaTensor, brain_mask: MetaTensor) -> tuple[Tensor, ...]:
    """Return `Example.indices` of a label [R, X, Y, Z] and a brain mask [1, X, Y, Z], both uint8."""
    masks = label.as_tensor()
    classes = torch.cat([1 - masks.amax(0, keepdim=True), masks])
    found = ClassesToIndicesd("classes", image_key="brain")({"classes": classes, "brain": brain_mask.as_tensor()})
    return tuple(torch.as_tensor(index).int() for index in found["classes_cls_indices"])


def _normalize(image: Tensor, brain_mask: Tensor) -> None:
    """Normalize channels [C, X, Y, Z], 0 outside of the brain [X, Y, Z], in place as in `NORMALIZATION`.

    A channel that is constant over the brain becomes 0.
    """
    for channel in image:
        inside = channel[brain_mask].double()
        low, high = np.percentile(inside.numpy(), _PERCENTILES)
        inside = inside.clamp(low, high)
        channel[brain_mask] = ((inside - inside.mean()) / (inside.std(correction=0) or 1)).to(channel.dtype)


# MONAI's inverse orientation determines the axes a second time, and for scans rotated by 45° rounding may exchange
# them.
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


def _reorient(volumes: NDArray[Any], orientation: NDArray[Any]) -> NDArray[Any]:
    """Permute and flip the axes of volumes [C, X, Y, Z]."""
    with_channels = np.vstack([[0, 1], orientation + np.array([1, 0])])
    return np.ascontiguousarray(apply_orientation(volumes, with_channels))
