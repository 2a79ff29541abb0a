"""Layouts against folders that the tests make."""

from pathlib import Path

import pytest

from dwp_pyro.config import DATASETS
from dwp_pyro.data.layouts import LAYOUTS, detect_layout, find_cases
from dwp_pyro.errors import DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_command_line_knows_every_layout():
    assert set(DATASETS) == set(LAYOUTS)


def test_brats_2018_and_2019_in_their_grades(tmp_path):
    touch(
        tmp_path,
        *(f"HGG/Brats18_A_1/Brats18_A_1_{m}.nii.gz" for m in ("flair", "t1", "t1ce", "t2", "seg")),
        *(f"LGG/BraTS19_B_2_1/BraTS19_B_2_1_{m}.nii" for m in ("flair", "t1")),
        "HGG/.Brats18_C_1-tmp/Brats18_C_1/Brats18_C_1_flair.nii.gz",
        "name_mapping.csv",
    )
    first, second = find_cases(tmp_path, LAYOUTS["brats"])
    assert (first.id, second.id) == ("BraTS19_B_2_1", "Brats18_A_1")
    assert set(second.images) == {"flair", "t1", "t1ce", "t2"}
    assert second.label == tmp_path / "HGG/Brats18_A_1/Brats18_A_1_seg.nii.gz"
    assert first.label is None
    assert find_cases(tmp_path / "HGG", LAYOUTS["brats"])[0].id == "Brats18_A_1"


@pytest.mark.parametrize("prefix", ["", "patient01_"])
def test_open_ms_data_in_both_namings(tmp_path, prefix):
    stems = ("FLAIR", "T1W", "T1WKS", "T2W", "consensus_gt", "brainmask")
    touch(tmp_path, *(f"patient01/{prefix}{stem}.nii.gz" for stem in stems))
    (case,) = find_cases(tmp_path, LAYOUTS["ms"])
    assert {m: path.name for m, path in case.images.items()} == {
        "flair": f"{prefix}FLAIR.nii.gz",
        "t1": f"{prefix}T1W.nii.gz",
        "t1ce": f"{prefix}T1WKS.nii.gz",
        "t2": f"{prefix}T2W.nii.gz",
    }
    assert case.label is not None and case.label.name.endswith("consensus_gt.nii.gz")
    assert case.brain is not None


def test_the_layout_is_told_from_the_folder(tmp_path):
    touch(tmp_path / "a", "patient01/FLAIR.nii.gz")
    touch(tmp_path / "b", "HGG/Brats18_A_1/Brats18_A_1_flair.nii.gz")
    assert detect_layout(tmp_path / "a").name == "openms"
    assert detect_layout(tmp_path / "b").name == "brats"


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_cases(tmp_path / "nowhere", LAYOUTS["brats"])
    with pytest.raises(DataError, match="no case of the layout 'brats'; expected HGG/"):
        find_cases(tmp_path, LAYOUTS["brats"])
    with pytest.raises(DataError, match="none of the known layouts"):
        detect_layout(tmp_path)


def test_doubles_are_refused(tmp_path):
    touch(tmp_path / "a", *(f"{grade}/Brats18_A_1/Brats18_A_1_flair.nii.gz" for grade in ("HGG", "LGG")))
    with pytest.raises(DataError, match="two cases are called 'Brats18_A_1'"):
        find_cases(tmp_path / "a", LAYOUTS["brats"])
    touch(tmp_path / "b", *(f"patient01/FLAIR{suffix}" for suffix in (".nii", ".nii.gz")))
    with pytest.raises(DataError, match=r"FLAIR\.nii: stands beside FLAIR\.nii\.gz"):
        find_cases(tmp_path / "b", LAYOUTS["ms"])


def test_regions_by_layout():
    assert LAYOUTS["brats"].region_values(None) == {"whole": {1, 2, 4}}
    assert LAYOUTS["brats"].region_values(["core"]) == {"core": {1, 4}}
    assert LAYOUTS["brats"].region_values(["enhancing", "whole"]) == {"enhancing": {4}, "whole": {1, 2, 4}}
    assert LAYOUTS["ms"].region_values(None) == {"lesion": {1}}
    with pytest.raises(DataError, match="'whole' is not one of lesion"):
        LAYOUTS["ms"].region_values(["whole"])
