"""Training patches, cropped and augmented as a function of seed and index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    MaskIntensityd,
    OneOf,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandHistogramShiftd,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    SpatialPadd,
)
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from dwp_pyro.data.preprocessing import AXES, Example

__all__ = ["Batch", "PatchDataset", "patch_shape"]

_MAX_ROTATION, _MAX_SHEAR, _MAX_SCALING = 0.3, 0.1, 0.2  # in radians, as fractions

_THICKNESS = (0.5, 1.5)  # range of the standard deviation, in voxels

_KEYS = ("image", "label", "brain_mask")

Batch = tuple[Tensor, Tensor, Tensor]


def patch_shape(examples: Sequence[Example], side: int, stride: int) -> tuple[int, int, int]:
    """Return the shape [x, y, z] of a training patch: `side` voxels, limited to the size of the examples.

    Args:
        examples: Training examples.
        side: Side in voxels.
        stride: Stride of the network's deepest features, in voxels; sides are multiples of it, at least two.
    """
    largest = [max(example.image.shape[1 + axis] for example in examples) for axis in range(3)]
    x, y, z = (max(2, min(math.ceil(side / stride), math.ceil(n / stride))) * stride for n in largest)
    return x, y, z


class PatchDataset(Dataset[Batch]):
    """Training patches; patch i is a function of the examples, the seed and i alone.

    Each epoch is a new permutation of the examples, and patch i is cropped and augmented with the seed (seed, i).
    Resuming and loading in other processes therefore give the same patches.

    Half of the patches are centered on a region, with equal probabilities of the regions, the others on the rest of the
    brain. Augmentations: mirroring; rotation, scaling and shear; and differences between scanners: gamma, contrast,
    brightness, resolution, slice thickness and noise.

    With `randomize`, the domain is randomized: lesions of a random case are pasted into half of the patches (as in
    CarveMix, Zhang et al. 2021), and half each get another monotone contrast, a bias field, and coarser voxels.

    Args:
        examples: Labeled examples, at least one.
        shape: Patch shape [x, y, z]; smaller examples are padded with 0.
        seed: Seed of crops and augmentations.
        length: Number of patches.
        modality_dropout: Probability of setting a modality to 0; at least one modality of the case stays.
        mirror: Axes, out of `AXES`, along which half of the patches are mirrored.
        randomize: Whether to randomize the domain.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        shape: tuple[int, int, int],
        seed: int,
        length: int,
        modality_dropout: float = 0.0,
        mirror: Sequence[str] = ("x",),
        randomize: bool = False,
    ) -> None:
        self.examples = list(examples)
        self.seed = seed
        self.length = length
        self.modality_dropout = modality_dropout
        # For a case that lacks regions, half of the patches are still centered on those it has.
        self._crops = {
            present: _crop(shape, [sum(present) or 1, *present])
            for present in {_present(example) for example in self.examples}
        }
        flips = [RandFlipd(_KEYS, prob=0.5, spatial_axis=AXES.index(axis)) for axis in mirror]
        self._transform = Compose(
            [
                SpatialPadd(_KEYS, shape),
                *([_PasteLesions(self.examples, shape)] if randomize else []),
                *flips,
                RandAffined(
                    _KEYS,
                    prob=0.5,
                    rotate_range=(_MAX_ROTATION,) * 3,
                    shear_range=(_MAX_SHEAR,) * 6,
                    scale_range=(_MAX_SCALING,) * 3,
                    mode=("bilinear", "nearest", "nearest"),
                    padding_mode="reflection",
                ),
                *(_domain_randomization() if randomize else []),
                RandAdjustContrastd("image", prob=0.5, gamma=(0.5, 2.0), retain_stats=True),
                RandScaleIntensityd("image", factors=0.3, prob=1.0),
                RandShiftIntensityd("image", offsets=0.3, prob=1.0),
                RandSimulateLowResolutiond("image", prob=0.2, zoom_range=(0.5, 1.0)),
                OneOf([_thick_slices(axis) for axis in range(3)]),
                RandGaussianNoised("image", prob=0.3, std=0.15),
                MaskIntensityd("image", mask_key="brain_mask"),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        """Return image [C, x, y, z], label [R, x, y, z], and mask of the voxels in the loss [1, x, y, z]."""
        epoch, position = divmod(index, len(self.examples))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        example = self.examples[order[position]]
        transform = Compose([self._crops[_present(example)], self._transform])
        transform.set_random_state(seed=int(np.random.default_rng([self.seed, index, 1]).integers(2**31)))
        tracked = get_track_meta()
        set_track_meta(False)  # MONAI's tracking of metadata takes a third of the time of a patch
        try:
            (patch,) = transform(_tensors(example))
        finally:
            set_track_meta(tracked)
        image, label, brain_mask = (patch[key] for key in _KEYS)
        if self.modality_dropout:
            image = image * self._kept_modalities(index, example)[:, None, None, None]
        return image, label.long(), (brain_mask == 1).float()

    def _kept_modalities(self, index: int, example: Example) -> Tensor:
        """Return 1 for modalities to keep in a patch and 0 for dropped and missing ones, [C]."""
        random = np.random.default_rng([self.seed, index, 2])
        available = example.image.as_tensor().flatten(1).any(1).numpy()
        kept = available & (random.random(len(available)) >= self.modality_dropout)
        if available.any() and not kept.any():
            kept[random.choice(np.flatnonzero(available))] = True
        return torch.from_numpy(kept).float()


def _tensors(example: Example) -> dict[Any, Any]:
    assert example.label is not None
    return {**{key: getattr(example, key).as_tensor() for key in _KEYS}, "indices": list(example.indices)}


def _crop(shape: tuple[int, int, int], ratios: Sequence[int]) -> RandCropByLabelClassesd:
    """Return a crop that is centered on the background and on each region, in these ratios."""
    return RandCropByLabelClassesd(
        _KEYS,
        "label",
        shape,
        ratios=list(ratios),
        num_classes=len(ratios),
        indices_key="indices",
        allow_smaller=True,
        warn=False,  # about missing regions
    )


class _PasteLesions(RandomizableTransform):
    """Paste the regions of a random example, and up to two voxels around them, into half of the patches.

    Examples that lack a modality or every region are skipped.
    """

    def __init__(self, examples: Sequence[Example], shape: tuple[int, int, int]) -> None:
        super().__init__(prob=0.5)
        self._donors = [
            (example, _present(example))
            for example in examples
            if any(_present(example)) and example.image.as_tensor().flatten(1).any(1).all()
        ]
        self._crops = {present: _crop(shape, [0, *present]) for _, present in self._donors}
        self._pad = SpatialPadd(_KEYS, shape)

    def __call__(self, patch: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        self.randomize(None)
        if not self._do_transform or not self._donors:
            return dict(patch)
        donor, present = self._donors[self.R.randint(len(self._donors))]
        self._crops[present].set_random_state(seed=int(self.R.randint(2**31)))
        (lesions,) = self._crops[present](_tensors(donor))
        pasted: dict[Any, Tensor] = self._pad(lesions)
        near = ndimage.binary_dilation(pasted["label"].any(0).numpy(), iterations=1 + self.R.randint(2))
        inside = torch.as_tensor(near) & (pasted["brain_mask"] == 1) & (patch["brain_mask"] == 1)
        return {**patch, **{key: torch.where(inside, pasted[key], patch[key]) for key in ("image", "label")}}


def _domain_randomization() -> list[Any]:
    return [
        RandHistogramShiftd("image", prob=0.5, num_control_points=(3, 8)),
        RandBiasFieldd("image", prob=0.5, coeff_range=(0.0, 0.2)),
        RandSimulateLowResolutiond("image", prob=0.5, zoom_range=(0.25, 1.0)),
    ]


def _present(example: Example) -> tuple[int, ...]:
    """Return 1 for each of the R regions that the example has and 0 for the others."""
    return tuple(int(len(region) > 0) for region in example.indices[1:])


def _thick_slices(axis: int) -> RandGaussianSmoothd:
    """Return a transform that blurs along one axis with probability 0.2, to simulate thick slices."""
    sigmas: dict[str, Any] = {
        f"sigma_{name}": _THICKNESS if number == axis else (0.0, 1e-6) for number, name in enumerate(AXES)
    }
    return RandGaussianSmoothd("image", prob=0.2, **sigmas)
