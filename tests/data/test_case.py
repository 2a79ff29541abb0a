"""Reading of cases, and one-line errors for bad files."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwp_pyro.data.case import Case, read_case, read_volume
from dwp_pyro.runtime.errors import DataError

LABELS = {1: "necrosis", 2: "oedema", 4: "enhancing"}
AFFINE = np.diag([-3.0, -3.0, 3.0, 1.0])


def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def case(tmp_path: Path) -> Case:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 100, (8, 9, 10)).astype(np.int16)
    image[0] = 0
    label = np.zeros((8, 9, 10), np.uint8)
    label[3:5, 3:5, 3:5] = 4
    files = {name: write(tmp_path / f"c_{name}.nii.gz", image) for name in ("flair", "t1")}
    return Case("c", files, write(tmp_path / "c_seg.nii.gz", label))


def test_a_case_is_read_in_the_order_of_the_modalities(case):
    write(case.images["t1"], np.full((8, 9, 10), 7, np.int16))
    scan = read_case(case, ("t1", "flair"), LABELS)
    assert scan.images.shape == (2, 8, 9, 10)
    assert (scan.images[0] == 7).all()
    assert set(np.unique(scan.label)) == {0, 4}
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.reference == case.images["t1"]


def test_without_a_mask_the_brain_is_where_an_image_is_not_0(case):
    scan = read_case(case, ("flair",), LABELS)
    np.testing.assert_array_equal(scan.brain_mask, scan.images[0] != 0)
    assert not scan.brain_mask[0].any()


def test_air_in_the_head_belongs_to_the_brain_mask(case):
    image = np.ones((8, 9, 10), np.int16)
    image[0], image[3:5, 4:6, 5] = 0, 0
    write(case.images["flair"], image)
    scan = read_case(case, ("flair",), LABELS)
    assert scan.brain_mask[1:].all() and not scan.brain_mask[0].any()


def test_a_brain_mask_is_used(case, tmp_path):
    mask = np.zeros((8, 9, 10), np.uint8)
    mask[2] = 1
    scan = read_case(Case("c", case.images, case.label, write(tmp_path / "mask.nii", mask)), ("flair",), LABELS)
    np.testing.assert_array_equal(scan.brain_mask, mask == 1)


def test_spacing_is_the_length_of_the_affines_columns(tmp_path):
    rotated = np.eye(4)
    rotated[:3, :3] = np.array([[0, -2.0, 0], [1.5, 0, 0], [0, 0, 4.0]])
    image = write(tmp_path / "v.nii", np.ones((3, 3, 3), np.float32), rotated)
    assert read_case(Case("v", {"t1": image}), ("t1",), {}).spacing == (1.5, 2.0, 4.0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flat(path: Path) -> None:
    write(path, np.ones((8, 9), np.float32))


def four_dimensional(path: Path) -> None:
    write(path, np.ones((8, 9, 10, 2), np.float32))


def not_a_number(path: Path) -> None:
    data = np.ones((8, 9, 10), np.float32)
    data[1, 1, 1] = np.nan
    write(path, data)


def another_shape(path: Path) -> None:
    write(path, np.ones((8, 9, 11), np.uint8))


def another_affine(path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] += 5
    write(path, np.ones((8, 9, 10), np.uint8), shifted)


def rgb(path: Path) -> None:
    colors = np.zeros((8, 9, 10), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colors, AFFINE), path)


def another_datatype(path: Path) -> None:
    """Set an unknown datatype code in the header."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[70:72] = (999).to_bytes(2, "little")
    path.write_bytes(gzip.compress(bytes(content)))


def rotated(path: Path) -> None:
    """Rotate the grid by five degrees about one corner."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.09), -np.sin(0.09)], [np.sin(0.09), np.cos(0.09)]]
    write(path, np.ones((8, 9, 10), np.uint8), turn @ AFFINE)


def no_affine(path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((8, 9, 10), np.uint8), None)
    image.header.set_sform(np.zeros((4, 4)), code=1)
    nibabel.save(image, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "cannot be read as NIfTI"),
        (lambda path: path.write_bytes(b"not a scan"), "cannot be read as NIfTI"),
        (lambda path: path.unlink(), "no such file"),
        (flat, "three-dimensional"),
        (four_dimensional, "8×9×10×2"),
        (not_a_number, "NaN"),
        (another_shape, "8×9×11"),
        (another_affine, "affine differs"),
        (no_affine, "singular"),
        (rgb, "plain numbers"),
        (another_datatype, "cannot be read"),
        (rotated, "affine differs"),
    ],
)
@pytest.mark.parametrize("which", ["image", "label"])
def test_a_bad_file_is_named_in_one_line(case, spoil, says, which):
    path = case.images["t1"] if which == "image" else case.label
    spoil(path)
    with pytest.raises(DataError) as caught:
        read_case(case, ("flair", "t1"), LABELS)
    message = str(caught.value)
    assert str(path) in message
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(("value", "says"), [(3, "unknown label value 3"), (1.5, "not whole numbers")])
def test_a_label_value_that_the_layout_does_not_know_is_refused(case, value, says):
    write(case.label, np.full((8, 9, 10), value, np.float32))
    with pytest.raises(DataError, match=says) as caught:
        read_case(case, ("flair",), LABELS)
    assert str(case.label) in str(caught.value)


@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.uint16])
def test_label_values_stored_with_a_scale_factor_are_whole(case, stored):
    """As nibabel writes a float array as integers."""
    image = nibabel.Nifti1Image(np.resize([0.0, 1.0, 2.0, 4.0], (8, 9, 10)), AFFINE)
    image.set_data_dtype(stored)
    nibabel.save(image, case.label)
    assert not np.array_equal(np.unique(nibabel.load(case.label).get_fdata()), [0, 1, 2, 4])
    label = read_case(case, ("flair",), {1: "oedema", 2: "necrosis", 4: "enhancing"}).label
    np.testing.assert_array_equal(np.unique(label), [0, 1, 2, 4])


def test_label_values_may_be_large(case):
    write(case.label, np.full((8, 9, 10), 65537, np.int32))
    assert read_case(case, ("flair",), {1: "lesion", 65537: "cyst"}).label.max() == 65537


def test_a_missing_modality_is_named(case):
    with pytest.raises(DataError, match=r"case c: has no t2 scan \(it has flair, t1\)"):
        read_case(case, ("flair", "t2"), LABELS)


def test_an_empty_brain_is_refused(case):
    write(case.images["flair"], np.zeros((8, 9, 10), np.int16))
    with pytest.raises(DataError, match="the brain of the case is empty"):
        read_case(case, ("flair",), LABELS)


def test_affines_that_differ_by_rounding_are_one_grid(case):
    almost = AFFINE.copy()
    almost[0, 3] += 1e-3
    write(case.label, np.zeros((8, 9, 10), np.uint8), almost)
    assert read_case(case, ("flair",), LABELS).label is not None


def test_ignored_voxels_are_in_the_brain_and_do_not_count(case):
    labels = {1: "lesion", 4: "ignore"}
    scan = read_case(case, ("flair",), labels)
    np.testing.assert_array_equal(scan.ignored, scan.label == 4)
    np.testing.assert_array_equal(scan.counted, scan.brain_mask & (scan.label != 4))
    assert scan.ignored.sum() == 8 and scan.brain_mask[scan.ignored].all()
    assert read_case(case, ("flair",), LABELS).ignored is None
    write(case.label, np.full((8, 9, 10), 4, np.uint8))
    with pytest.raises(DataError, match="every voxel of the brain is labeled 'ignore'"):
        read_case(case, ("flair",), labels)


def test_further_axes_of_length_1_are_dropped(tmp_path):
    data = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    for suffix in ("nii", "nii.gz"):
        path = write(tmp_path / f"v.{suffix}", data[..., None, None])
        np.testing.assert_array_equal(read_volume(path).data, data)


def test_a_channel_is_read_alone(tmp_path):
    data = np.arange(2 * 3 * 4 * 3, dtype=np.int16).reshape(2, 3, 4, 3)
    path = write(tmp_path / "v.nii.gz", data)
    np.testing.assert_array_equal(read_volume(path, 2).data, data[..., 2])
    with pytest.raises(DataError, match="expected a four-dimensional file with 4 channels or more"):
        read_volume(path, 3)
    with pytest.raises(DataError, match="expected a four-dimensional file"):
        read_volume(write(tmp_path / "flat.nii.gz", data[..., 0]), 0)
