"""Preprocessing, its inverse, and patches as a function of their index."""

import dataclasses
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from dwp_pyro.data.case import Scan
from dwp_pyro.data.patches import PatchDataset, _PasteLesions, patch_shape
from dwp_pyro.data.preprocessing import Example, Preprocessing
from dwp_pyro.runtime.errors import DataError


def test_images_are_normalized_over_the_brain_and_0_outside(scan):
    example = Preprocessing(None)(scan, [frozenset({4})])
    inside = example.brain_mask[0].as_tensor() > 0
    assert int(inside.sum()) == scan.brain_mask.sum()
    for channel in example.image.as_tensor():
        assert abs(float(channel[inside].mean())) < 1e-5
        assert abs(float(channel[inside].std(correction=0)) - 1) < 1e-4
        assert (channel[~inside] == 0).all()


def test_single_bright_voxels_do_not_change_the_normalization(scan):
    """Intensities are clipped to the percentiles 0.5 and 99.5."""
    bright = scan.images.copy()
    bright[:, 9, 10, 11] = 1e6
    before, after = (
        Preprocessing(None)(dataclasses.replace(scan, images=images), []).image.as_tensor()
        for images in (scan.images, bright)
    )
    assert float((before - after).abs().quantile(0.99)) < 0.01
    assert float(after.max()) < 3


def test_the_region_is_made_of_its_label_values(scan):
    whole, enhancing = (Preprocessing(None)(scan, [frozenset(values)]) for values in ({2, 4}, {4}))
    assert int(whole.label.sum()) == (scan.label > 0).sum() == len(whole.indices[1])
    assert int(enhancing.label.sum()) == (scan.label == 4).sum()
    assert len(enhancing.indices[0]) == scan.brain_mask.sum() - (scan.label == 4).sum()


def test_voxels_that_are_far_too_small_are_refused(scan):
    with pytest.raises(DataError, match="more than 1,000,000,000 voxels of 0.003 mm"):
        Preprocessing(0.003)(scan, ())


def test_without_regions_there_is_no_label(scan):
    example = Preprocessing(None)(scan, ())
    assert example.label is None and example.indices == ()


def test_the_grid_is_ras_and_cropped_to_the_brain(scan):
    example = Preprocessing(None)(scan, [frozenset({4})])
    # Sides of the brain along the axes that point right, front and up.
    assert tuple(example.image.shape) == (2, 17, 23, 14)
    rotation = example.image.affine[:3, :3].numpy()
    assert (np.diag(rotation) > 0).all()
    assert np.allclose(rotation, np.diag(np.diag(rotation)))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_maps_are_inverted_for_every_orientation(scan, order):
    """All 48 orientations, on a cube, whose shape does not reveal exchanged axes."""
    cube = dataclasses.replace(
        scan, images=scan.images[:, :20, :20, :20], brain_mask=scan.brain_mask[:20, :20, :20], label=None
    )
    for signs in product((-1, 1), repeat=3):
        turned = dataclasses.replace(cube, affine=np.vstack([np.diag(signs)[list(order)] @ np.eye(3, 4), [0, 0, 0, 1]]))
        example = assert_inverted(turned)
        assert (np.diag(example.image.affine)[:3] > 0).all()


def test_maps_are_inverted_for_scans_rotated_by_45_degrees(scan):
    """No axis is nearest: rounding decides, and the inverse must make the same choice."""
    for angles in product((-180, -165, -135, -45, -30), (-45, 0, 45), (-135, 0, 30, 135)):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        turned = dataclasses.replace(scan, affine=affine)
        assert_inverted(turned)


def assert_inverted(scan: Scan) -> Example:
    preprocess = Preprocessing(None)
    example = preprocess(scan, [])
    back = preprocess.invert(example.image.as_tensor(), example, scan)
    inside = scan.images[:, scan.brain_mask]
    inside = np.clip(inside, *(np.percentile(inside, q, axis=1, keepdims=True) for q in (0.5, 99.5)))
    mean, deviation = (getattr(inside, what)(axis=1, keepdims=True) for what in ("mean", "std"))
    np.testing.assert_allclose(back[:, scan.brain_mask], (inside - mean) / deviation, atol=1e-3)
    return example


def test_the_inverse_restores_every_voxel(scan):
    preprocess = Preprocessing(None)
    example = preprocess(scan, [frozenset({2, 4})])
    back = preprocess.invert(example.label.as_tensor(), example, scan)
    np.testing.assert_array_equal(back[0], scan.label > 0)


def test_the_inverse_of_resampling_is_on_the_grid_of_the_scan(scan):
    preprocess = Preprocessing(2.0)
    example = preprocess(scan, [frozenset({2, 4})])
    spacing = torch.linalg.vector_norm(example.image.affine[:3, :3], dim=0)
    assert torch.allclose(spacing, torch.full((3,), 2.0, dtype=spacing.dtype))
    back = preprocess.invert(example.label.as_tensor(), example, scan)
    truth = scan.label > 0
    assert back.shape == (1, *truth.shape)
    predicted = back[0] > 0.5
    assert 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()) > 0.8


@pytest.mark.parametrize("spacing", [None, 1.7, 3.0])
def test_maps_do_not_fall_off_at_the_faces_of_the_brain(scan, spacing):
    """They end at the bounding box of the brain on the network's grid, which is not that on the grid of the scan."""
    box = np.zeros_like(scan.brain_mask)
    box[3:17, 4:18, 2:15] = True
    boxed = dataclasses.replace(scan, brain_mask=box)
    preprocess = Preprocessing(spacing)
    example = preprocess(boxed, [])
    back = preprocess.invert(torch.full((2, *example.image.shape[1:]), 0.8), example, boxed)
    np.testing.assert_allclose(back[:, box], 0.8, atol=1e-5)
    assert (back[:, ~box] == 0).all()


def test_patches_are_a_function_of_their_index(scan):
    example = Preprocessing(None)(scan, [frozenset({2, 4})])
    first, second = (PatchDataset([example], (16, 16, 8), 3, 50) for _ in range(2))
    _ = [second[i] for i in (7, 1)]
    for a, b in zip(first[5], second[5], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[5][0], first[6][0])
    other_seed = PatchDataset([example], (16, 16, 8), 4, 50)
    assert not torch.equal(first[5][0], other_seed[5][0])


def test_patches_use_each_case_once_per_epoch_and_contain_each_region(scan):
    """Half are centered on a region, equally often on one and on the other, which is 15 times as large."""
    preprocess = Preprocessing(None)
    cut = [dataclasses.replace(scan, brain_mask=scan.brain_mask & (np.arange(28) < end)) for end in (25, 24, 23)]
    examples = [preprocess(each, [frozenset({2}), frozenset({4})]) for each in cut]
    patches = PatchDataset(examples, (8, 8, 8), 0, 300)
    taken = []

    class Recorder(list):
        def __getitem__(self, number):
            taken.append(number)
            return super().__getitem__(number)

    patches.examples = Recorder(examples)
    for round_ in range(3):
        for i in range(3):
            patches[3 * round_ + i]
        assert sorted(taken[-3:]) == [0, 1, 2]
    labels = torch.stack([patches[i][1] for i in range(300)])
    met = labels.flatten(2).any(2).float().mean(0)
    assert met.min() > 0.3
    center = labels[..., 4, 4, 4].float().mean(0)
    # Approximately: a rotation moves the center by a voxel.
    assert 0.35 < float(center.sum()) < 0.55
    assert abs(float(center[1]) - 0.25) < 0.12


def test_a_case_without_some_regions_gives_patches(scan):
    """Half of its patches are centered on the region that it has."""
    example = Preprocessing(None)(scan, [frozenset({2}), frozenset({9}), frozenset({10})])
    assert [len(places) > 0 for places in example.indices] == [True, True, False, False]
    patches = PatchDataset([example], (2, 2, 2), 0, 300, mirror=())
    hits = float(torch.stack([patches[i][1].any() for i in range(300)]).float().mean())
    assert 0.4 < hits < 0.65  # a third if missing regions were replaced by background


def test_a_patch_keeps_image_label_and_brain_aligned(scan):
    """In a region twice as bright as the rest, the bright voxels are the label, except at blurred edges."""
    preprocess = Preprocessing(None)
    label = np.zeros(scan.brain_mask.shape, np.int16)
    label[5:12, 8:16, 8:18] = 2
    scan = dataclasses.replace(scan, label=label)
    marked = Scan("c", np.where(label > 0, 1000, 500)[None].astype(np.float32) * scan.brain_mask, *_rest(scan))
    patches = PatchDataset([preprocess(marked, [frozenset({2, 4})])], (16, 16, 8), 0, 40, mirror=("x", "y", "z"))
    agreements = []
    for i in range(40):
        image, label, brain_mask = patches[i]
        assert image.shape == label.shape == brain_mask.shape == (1, 16, 16, 8)
        assert (image[brain_mask == 0] == 0).all()
        inside, outside = label == 1, (label == 0) & (brain_mask == 1)
        if min(inside.sum(), outside.sum()) > 50:
            middle = (image[inside].median() + image[outside].median()) / 2
            bright = (image > middle) & (brain_mask == 1)
            agreements.append(float(2 * (bright & inside).sum() / (bright.sum() + inside.sum())))
    assert len(agreements) > 10 and np.mean(agreements) > 0.85


@pytest.mark.parametrize(("mirror", "expected"), [((), 0), (("x",), 2), (("x", "y", "z"), 8)])
def test_patches_are_mirrored_along_the_given_axes(scan, mirror, expected):
    """A bright corner appears in as many corners as the mirrored axes allow."""
    image = np.full((1, 16, 16, 16), 100, np.float32)
    image[:, :8, :8, :8] = 300
    label = np.zeros(image.shape[1:], np.int16)
    label[:8, :8, :8] = 2
    whole = Scan("c", image, np.ones(label.shape, bool), label, np.eye(4), Path("c.nii"))
    patches = PatchDataset([Preprocessing(None)(whole, [frozenset({2})])], (16, 16, 16), 0, 60, mirror=mirror)
    halves = (slice(0, 8), slice(8, 16))
    corners = {
        max(product(range(2), repeat=3), key=lambda c, label=label: int(label[0][tuple(halves[k] for k in c)].sum()))
        for _, label, _ in (patches[i] for i in range(60))
    }
    assert len(corners) == max(1, expected)


def _rest(scan: Scan) -> tuple:
    return scan.brain_mask, scan.label, scan.affine, scan.reference


def test_patch_shape_is_no_larger_than_the_scans(scan):
    example = Preprocessing(None)(scan, [frozenset({4})])
    assert patch_shape([example], 64, 8) == (24, 24, 16)
    assert patch_shape([example], 16, 8) == (16, 16, 16)


def test_patches_differ_as_scanners_do():
    """With three gray values, gamma changes the contrast ratio of half of the patches, a third have noise, and contrast
    and brightness vary; within four standard errors of a binomial count."""
    values = np.repeat([100.0, 200.0, 300.0], 8)
    image = np.broadcast_to(values[:, None, None], (24, 12, 12)).astype(np.float32)[None].copy()
    brain_mask = np.ones(image.shape[1:], bool)
    label = np.zeros(brain_mask.shape, np.int16)
    label[12, 6, 6] = 4
    example = Preprocessing(None)(Scan("c", image, brain_mask, label, np.eye(4), Path("c.nii")), [frozenset({4})])
    patches, draws = PatchDataset([example], (24, 12, 12), 0, 200), 200
    inside = (slice(3, 5), slice(11, 13), slice(19, 21))  # away from blurred edges
    images = [patches[i][0][0] for i in range(draws)]
    parts = [[image[part] for part in inside] for image in images]
    medians = torch.tensor([sorted(float(part.median()) for part in triple) for triple in parts])
    contrast = medians[:, 2] - medians[:, 0]
    bent = ((medians[:, 1] - medians[:, 0]) / contrast - 0.5).abs() > 0.03
    planes = [[part[:, 4:8, 4:8].std((1, 2)).min() for part in triple] for triple in parts]  # of one gray value each
    noisy = torch.tensor(planes).amin(1) > 1e-3
    for count, probability in ((int(bent.sum()), 0.5), (int(noisy.sum()), 0.3)):
        # A gamma near 1 changes too little to be counted.
        assert 0.8 * probability * draws - 30 < count < probability * draws + 30
    assert float(contrast.std() / contrast.mean()) > 0.1
    assert float(medians[:, 1].std() / contrast.mean()) > 0.05


def test_modality_dropout_keeps_one_available_modality(scan):
    """The case lacks the second of three modalities; counts within four standard errors of a binomial."""
    images = np.concatenate([scan.images[:1], 0 * scan.images[:1], scan.images[:1]])
    example = Preprocessing(None)(Scan("c", images, *_rest(scan)), [frozenset({4})])
    assert not example.image[1].any()
    patches = PatchDataset([example], (16, 16, 16), 0, 200, modality_dropout=0.5)
    seen = torch.stack([patches[i][0].flatten(1).any(1) for i in range(200)])
    assert not seen[:, 1].any()
    assert seen.any(1).all()
    # Both stay with probability 1/4; if none stays, one is kept.
    assert abs(float((seen[:, 0] & seen[:, 2]).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5
    again = PatchDataset([example], (16, 16, 16), 0, 200, modality_dropout=0.5)
    assert torch.equal(again[7][0], patches[7][0])


def test_a_scan_without_contrast_survives_modality_dropout(scan):
    """Its only channel is 0 after normalization, so that no modality is available."""
    flat = dataclasses.replace(scan, images=7 * scan.brain_mask[None].astype(np.float32))
    patches = PatchDataset([Preprocessing(None)(flat, [frozenset({2})])], (16, 16, 16), 0, 5, modality_dropout=0.5)
    assert all(part.isfinite().all() for i in range(5) for part in patches[i])


def test_ignored_voxels_keep_their_image_and_are_excluded(scan):
    """In preprocessing and in patches, the image is the same as without ignored voxels."""
    ignored = np.zeros(scan.brain_mask.shape, bool)
    ignored[4:8, 5:9, 5:9] = True  # 64 voxels of the brain, none of the region
    partly = dataclasses.replace(scan, ignored=ignored)
    whole, part = (Preprocessing(None)(each, [frozenset({2, 4})]) for each in (scan, partly))
    assert torch.equal(whole.image.as_tensor(), part.image.as_tensor())
    assert sorted(part.brain_mask.unique().tolist()) == [1, 2]  # the box is all brain
    assert int((part.brain_mask == 2).sum()) == 64
    assert torch.equal(whole.brain_mask.as_tensor() > 0, part.brain_mask.as_tensor() > 0)
    (image, label, counts), (image_, label_, brain_mask) = (
        PatchDataset([example], (24, 24, 24), 0, 1)[0] for example in (part, whole)
    )
    assert torch.equal(image, image_) and torch.equal(label, label_)
    assert counts.sum() == scan.brain_mask.sum() - 64
    assert int((brain_mask - counts).sum()) == 64 and float((brain_mask - counts).min()) == 0
    assert (image[:, (brain_mask - counts)[0] == 1] != 0).any()


def _within(scan: Scan, *voxels: tuple[int, int, int]) -> Scan:
    brain_mask = np.zeros_like(scan.brain_mask)
    for voxel in voxels:
        brain_mask[voxel] = True
    return dataclasses.replace(scan, brain_mask=brain_mask)


@pytest.mark.parametrize(
    "unusual", ["two voxels", "constant", "zero", "faint", "bright", "huge", "one bright voxel", "nearly constant"]
)
def test_no_image_becomes_nan(scan, unusual):
    """Neither by normalization nor by augmentation."""
    images = scan.images.copy()
    if unusual == "two voxels":
        scan = _within(scan, (9, 10, 11), (5, 10, 11))  # one in the region, one outside
    elif unusual in ("constant", "zero"):
        images[:] = 7 if unusual == "constant" else 0
    elif unusual in ("faint", "bright", "huge"):
        images *= np.float32({"faint": 1e-33, "bright": 1e25, "huge": 1e34}[unusual])
    elif unusual == "one bright voxel":
        images[0, 9, 10, 11] = 1e30
    else:
        images[:] = 7 + 1e-7 * images
    example = Preprocessing(None)(dataclasses.replace(scan, images=images), [frozenset({2, 4})])
    assert example.image.isfinite().all()
    patches = PatchDataset([example], (16, 16, 16), 0, 40)
    assert all(torch.isfinite(part).all() for i in range(40) for part in patches[i])


@pytest.mark.parametrize("spacing", [None, 12.0])
def test_a_brain_of_less_than_two_voxels_is_refused(scan, spacing):
    """One voxel; two voxels that resampling loses."""
    voxels = [(9, 10, 11)] if spacing is None else [(9, 10, 11), (9, 10, 12)]
    with pytest.raises(DataError, match="c.nii: the brain of case c has [01] voxels.*smaller spacing"):
        Preprocessing(spacing)(_within(scan, *voxels), [frozenset({2})])


def test_a_randomized_domain_shows_lesions_of_other_cases(scan):
    """A case without lesions has some in the patches that get those of the other case: in about half."""
    healthy, ill = (
        Preprocessing(None)(dataclasses.replace(scan, label=scan.label * keep), [frozenset({2, 4})]) for keep in (0, 1)
    )
    patches = PatchDataset([healthy, ill], (16, 16, 16), 0, 200, randomize=True)
    assert not any(part[1].any() for part in map(PatchDataset([healthy], (16, 16, 16), 0, 20).__getitem__, range(20)))
    first = [np.random.default_rng([0, epoch]).permutation(2)[0] for epoch in range(100)]
    of_healthy = [2 * epoch + int(number) for epoch, number in enumerate(first)]
    shown = [bool(patches[index][1].any()) for index in of_healthy]
    assert 0.3 < sum(shown) / len(shown) < 0.7
    for index in range(20):
        for part, again in zip(patches[index], patches[index], strict=True):
            assert torch.equal(part, again)
            assert part.isfinite().all()


def test_pasted_lesions_bring_their_image(scan):
    ill = Preprocessing(None)(scan, [frozenset({2, 4})])
    bright = torch.where(ill.label.as_tensor() > 0, 9.0, 1.0).expand(2, -1, -1, -1)
    paste = _PasteLesions([dataclasses.replace(ill, image=MetaTensor(bright))], (16, 16, 16))
    brain_mask = torch.ones(1, 16, 16, 16)
    brain_mask[:, :8] = 0
    patch = {"image": torch.zeros(2, 16, 16, 16), "label": torch.zeros(1, 16, 16, 16), "brain_mask": brain_mask}
    pasted = []
    for seed in range(20):
        paste.set_random_state(seed=seed)
        pasted.append(paste(patch))
    with_lesion = [each for each in pasted if each["label"].any()]
    assert 5 <= len(with_lesion) <= 15
    for each in with_lesion:
        assert torch.equal(each["image"] == 9, (each["label"] == 1).expand(2, -1, -1, -1))
        assert (each["image"] == 1).any()  # the margin
        assert not each["image"][:, :8].any()  # no brain
