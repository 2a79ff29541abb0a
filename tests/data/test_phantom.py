"""Generated scans: reproducible, in the layouts of real data sets, with the disease at the label."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from dwp_pyro.data import phantom
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.runtime.errors import DataError, RunError

SHAPE = (32, 32, 32)
CASES = 3
Dataset = Literal["ms", "brats"]
SCANS = {"ms": ("FLAIR", "T1W", "T1WKS", "T2W"), "brats": ("flair", "t1", "t1ce", "t2")}
LABEL = {"ms": "consensus_gt", "brats": "seg"}
VALUES = {"ms": {0, 1}, "brats": {0, 1, 2, 4}}


@pytest.fixture(scope="module", params=["ms", "brats"])
def dataset(request: pytest.FixtureRequest) -> Dataset:
    return request.param


@pytest.fixture(scope="module")
def root(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(dataset)
    write_phantoms(dataset, out, CASES, shape=SHAPE)
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def folders(root: Path) -> list[Path]:
    return sorted({path.parent for path in root.rglob("*.nii.gz")})


def voxels(folder: Path, name: str) -> NDArray[np.integer]:
    return np.asarray(nib.Nifti1Image.from_filename(folder / f"{folder.name}_{name}.nii.gz").dataobj)


def test_a_larger_data_set_begins_with_the_smaller_one(dataset: Dataset, root: Path, tmp_path: Path) -> None:
    write_phantoms(dataset, tmp_path, CASES - 1, shape=SHAPE)
    short, long = contents(tmp_path), contents(root)
    assert short == {name: long[name] for name in short}


def test_heads_differ_between_seeds_cases_and_data_sets(tmp_path: Path) -> None:
    for dataset in ("ms", "brats"):
        write_phantoms(dataset, tmp_path / f"{dataset}0", 2, shape=SHAPE)
        write_phantoms(dataset, tmp_path / f"{dataset}1", 2, seed=1, shape=SHAPE)
    brain_masks = [
        nib.as_closest_canonical(nib.Nifti1Image.from_filename(scan)).get_fdata() > 0
        for scan in sorted([*tmp_path.rglob("*_FLAIR.nii.gz"), *tmp_path.rglob("*_flair.nii.gz")])
    ]
    assert len({brain_mask.tobytes() for brain_mask in brain_masks}) == len(brain_masks) == 8


def test_layout_of_open_ms_data(tmp_path: Path) -> None:
    ids = write_phantoms("ms", tmp_path, 2, shape=SHAPE)
    assert ids == ["patient01", "patient02"]
    assert set(contents(tmp_path)) == {
        f"{i}/{i}_{name}.nii.gz" for i in ids for name in (*SCANS["ms"], "consensus_gt", "brainmask")
    }
    assert not list(tmp_path.rglob(".*"))


def test_layout_of_brats(tmp_path: Path) -> None:
    ids = write_phantoms("brats", tmp_path, 2, shape=SHAPE)
    assert ids == ["Brats18_PHA_001_1", "Brats18_PHA_002_1"]
    assert set(contents(tmp_path)) == {f"HGG/{i}/{i}_{name}.nii.gz" for i in ids for name in (*SCANS["brats"], "seg")}
    assert not list(tmp_path.rglob(".*"))


def test_every_file_of_a_case_has_the_orientation_of_the_real_data_set(dataset: Dataset, tmp_path: Path) -> None:
    write_phantoms(dataset, tmp_path, 1, shape=(28, 32, 24), spacing=2.0)
    expected = {
        "ms": [[2, 0, 0, -27], [0, 2, 0, -31], [0, 0, 2, -23], [0, 0, 0, 1]],
        "brats": [[-2, 0, 0, 0], [0, -2, 0, 62], [0, 0, 2, 0], [0, 0, 0, 1]],
    }[dataset]
    for path in tmp_path.rglob("*.nii.gz"):
        image = nib.Nifti1Image.from_filename(path)
        assert image.shape == (28, 32, 24)
        np.testing.assert_array_equal(image.affine, expected)
        np.testing.assert_allclose(image.get_qform(coded=True)[0], expected, atol=1e-6)
        assert image.header["sform_code"] == image.header["qform_code"] == 1


def test_brain_is_positive_and_the_rest_exactly_zero(dataset: Dataset, root: Path) -> None:
    for folder in folders(root):
        scans = [voxels(folder, name) for name in SCANS[dataset]]
        brain_mask = voxels(folder, "brainmask") if dataset == "ms" else scans[0] > 0
        assert 0.1 < brain_mask.mean() < 0.6
        for scan in scans:
            assert scan.dtype == np.int16 and scan.min() == 0
            np.testing.assert_array_equal(scan > 0, brain_mask)


def test_label_has_the_values_of_the_data_set_and_stays_in_the_brain(dataset: Dataset, root: Path) -> None:
    seen: set[int] = set()
    for folder in folders(root):
        label = voxels(folder, LABEL[dataset])
        assert label.dtype == np.uint8 and label.any()
        assert not label[voxels(folder, SCANS[dataset][0]) == 0].any()
        seen |= set(np.unique(label).tolist())
    assert seen == VALUES[dataset]


def test_disease_has_the_expected_contrast(dataset: Dataset, root: Path) -> None:
    for folder in folders(root):
        flair, t1, t1ce, t2 = (voxels(folder, name).astype(float) for name in SCANS[dataset])
        label = voxels(folder, LABEL[dataset])
        healthy = (flair > 0) & (label == 0)
        white = healthy & (t1 > np.quantile(t1[healthy], 0.7))  # white matter is the brightest healthy tissue on T1
        water = label == (1 if dataset == "ms" else 2)
        assert np.median(flair[water]) > np.median(flair[white])
        assert np.median(t2[water]) > np.median(t2[white])
        assert np.median(t1[water]) < np.median(t1[white])
        if dataset == "brats" and (label == 4).any():
            assert np.median(t1ce[label == 4]) > np.median(t1ce[white])


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "patient02").mkdir()
    (tmp_path / "patient02" / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match=r"patient02: exists already.*choose another folder"):
        write_phantoms("ms", tmp_path, 3, shape=SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ["patient02"]
    assert contents(tmp_path) == {"patient02/mine.txt": b"keep me"}


def test_an_interrupted_case_leaves_no_folder(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def full_disk(image: nib.Nifti1Image, path: Path) -> None:
        saved.append(path)
        if len(saved) == 3:
            raise OSError("disk full")
        nib.Nifti1Image.to_filename(image, path)

    monkeypatch.setattr(phantom.nib, "save", full_disk)
    with pytest.raises(RunError, match="disk full"):
        write_phantoms(dataset, tmp_path, 1, shape=SHAPE)
    assert not [path for path in tmp_path.rglob("*") if path.name != "HGG"]
