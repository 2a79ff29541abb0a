"""Volumes of a viewer hold the values on the grid of the scan, in few bytes."""

import gzip

import nibabel
import numpy as np
import pytest

from dwp_pyro.evaluation.viewer import case_view

SHAPE = (9, 10, 11)
AFFINE = np.array([[-1.5, 0.2, 0, 30], [0.1, 2, 0, -40], [0, 0, -3, 50], [0, 0, 0, 1.0]])


def view(truth_at=(slice(3, 6), slice(4, 7), slice(5, 7))):
    rng = np.random.default_rng(0)
    brain_mask = np.zeros(SHAPE, dtype=bool)
    brain_mask[2:8, 1:9, 3:10] = True
    truth = np.zeros(SHAPE, dtype=bool)
    truth[truth_at] = True
    probability = np.where(brain_mask, rng.random(SHAPE), 0).astype(np.float32) * 0.4
    maps = (probability * 0.5, probability * 0.01)
    image = np.where(brain_mask, 100 + 900 * rng.random(SHAPE), 0).astype(np.float32)
    case = case_view("flair", AFFINE, image, brain_mask, truth, probability > 0.5, probability, *maps)
    return case, (image, truth, probability > 0.5, probability, *maps)


def read(layer):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(layer.nifti))


def test_a_reader_sees_the_values_where_they_were():
    case, volumes = view()
    for layer, volume in zip(case.layers, volumes, strict=True):
        image = read(layer)
        assert image.get_data_dtype() == np.uint8 and image.shape == (6, 8, 7)  # the box of the brain
        assert image.affine == pytest.approx(AFFINE @ nibabel.affines.from_matvec(np.eye(3), [2, 1, 3]), abs=1e-5)
        expected = np.clip(volume[2:8, 1:9, 3:10], layer.low, layer.high)
        steps = 255 if layer.title == "flair" else 100
        assert image.get_fdata() == pytest.approx(expected, abs=0.501 * (layer.high - layer.low) / steps)


def test_the_box_holds_what_lies_outside_the_brain_too():
    case, _ = view(truth_at=(slice(0, 1), slice(9, 10), slice(0, 11)))
    assert read(case.layers[1]).shape == (8, 9, 11)


def test_ranges_are_those_that_are_known():
    case, volumes = view()
    assert [(layer.title, layer.high) for layer in case.layers[1:]] == [
        ("truth", 1),
        ("prediction", 1),
        ("probability", 1),
        ("entropy", pytest.approx(np.log(2))),
        ("mutual information", pytest.approx(volumes[-1].max())),
    ]
    box = volumes[0][2:8, 1:9, 3:10]
    assert (case.layers[0].low, case.layers[0].high) == pytest.approx(tuple(np.percentile(box, [0.2, 99.8])))


def test_the_cross_starts_in_the_largest_sections_of_the_truth():
    case, volumes = view()
    voxel = np.linalg.inv(AFFINE) @ [*case.focus, 1]
    assert volumes[1][tuple(np.rint(voxel[:3]).astype(int))]
