"""The spacing that is chosen from the scans, and the seed of the split."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dwp_pyro.config.training import FitPriorConfig, SviConfig
from dwp_pyro.data.case import Scan
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.runtime.errors import DataError
from dwp_pyro.training.training_data import choose_spacing, find_split, find_unlabelled, load_unlabelled, resolve


def scan(spacing: tuple[float, float, float], head: int, *structures: tuple[slice, slice, slice]) -> Scan:
    """Return a scan of a cubic head with sides of `head` mm; each structure is a box in mm."""
    shape = tuple(round(200 / side) for side in spacing)
    brain_mask, label = np.zeros(shape, bool), np.zeros(shape, np.int16)
    brain_mask[tuple(slice(0, round(head / side)) for side in spacing)] = True
    for value, box in enumerate(structures, start=1):
        label[tuple(slice(round(b.start / mm), round(b.stop / mm)) for b, mm in zip(box, spacing, strict=True))] = value
    images = brain_mask[None].astype(np.float32)
    return Scan("c", images, brain_mask, label, np.diag([*spacing, 1.0]), Path("c.nii"))


ONE, SMALL = slice(0, 100), slice(110, 120)


@pytest.mark.parametrize(
    ("scans", "expected"),
    [
        ([scan((1.0, 1.0, 1.0), 40, (SMALL,) * 3)], 1.0),  # the scan's own
        ([scan((1.0, 1.0, 5.0), 40, (SMALL,) * 3)], 1.0),  # its finest side
        ([scan((1.0, 1.0, 1.0), 160, (SMALL,) * 3)], 0.8 * 160 / 32),  # 0.8 of the brain in a patch
        ([scan((1.0, 1.0, 1.0), 160, (ONE, SMALL, SMALL))], 1.5 * 100 / 32),  # the structure and what is around it
        ([scan((1.0, 1.0, 1.0), 40)] * 3, 1.0),  # without any structure
        ([scan((side, side, side), 40, (SMALL,) * 3) for side in (1.0, 2.0, 4.0)], 2.0),  # the median
    ],
)
def test_a_patch_covers_the_structure_and_most_of_the_brain(scans, expected):
    regions = [frozenset({1})]
    assert choose_spacing(scans, regions, 32, 0.8) == pytest.approx(expected, abs=0.02)
    assert choose_spacing(scans, regions, 10**6, 0.8) == pytest.approx(np.median([min(s.spacing) for s in scans]))


def test_patches_of_a_source_network_are_smaller_and_show_less_of_the_brain(tmp_path):
    assert (FitPriorConfig().patch, FitPriorConfig().batch_size) == (32, 2)
    assert (SviConfig().patch, SviConfig().batch_size) == (48, 1)
    write_phantoms("ms", tmp_path, 3, shape=(60, 72, 60), spacing=1.0)
    settings = {"root": str(tmp_path), "patch": 16, "validation": 1}
    source, target = resolve(FitPriorConfig(**settings), None), resolve(SviConfig(**settings), 1)
    assert source.spacing is not None and target.spacing is not None
    assert source.spacing > 1 and source.spacing / target.spacing == pytest.approx(0.5 / 0.8, rel=0.01)


def test_small_voxels_are_not_rounded_to_zero():
    tiny = scan((1.0, 1.0, 1.0), 40)
    tiny = dataclasses.replace(tiny, affine=np.diag([0.004, 0.004, 0.004, 1.0]))
    assert choose_spacing([tiny], [frozenset({1})], 32, 0.8) == pytest.approx(0.004)


def test_the_largest_component_of_each_region_is_measured():
    """Two regions of 100 and 60 mm, the second with a small further component: their median is 80."""
    boxes = (ONE, SMALL, SMALL), (slice(0, 60), SMALL, slice(150, 160))
    both = scan((1.0, 1.0, 1.0), 40, *boxes)
    assert both.label is not None
    both.label[190, 190, 190] = 2
    assert choose_spacing([both], [frozenset({1}), frozenset({2})], 32, 0.8) == 1.5 * 80 / 32


def test_runs_of_several_seeds_can_have_the_same_cases(tmp_path):
    write_phantoms("brats", tmp_path, 9, shape=(20, 24, 20))

    def split_of(**settings: int) -> object:
        return find_split(SviConfig(root=str(tmp_path), validation=2, **settings), 3)[1]

    assert split_of(seed=1) != split_of(seed=2)
    assert split_of(seed=1, split_seed=2) == split_of(seed=2) == split_of(seed=2, split_seed=2)
    assert split_of(seed=7, split_seed=0) == split_of()


def test_unlabelled_scans_are_of_other_patients(tmp_path):
    """Neither files of the split, by whatever path, nor further visits of its patients."""
    write_phantoms("brats", tmp_path / "data", 6, shape=(16, 18, 16), spacing=8.0)
    scans = sorted((tmp_path / "data").rglob("*_flair.nii.gz"))
    rows = ["id,patient,flair,label"]
    for number, (name, patient) in enumerate([("a", "A"), ("b", "B"), ("b2", "B"), ("c", ""), ("d", "D")]):
        label = str(scans[number]).replace("_flair", "_seg") if name in "abc" else ""
        rows.append(f"{name},{patient},{scans[number]},{label}")
    (tmp_path / "scans.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "validation": ["c"], "test": ["b"]}))
    config = SviConfig(
        root=str(tmp_path / "scans.csv"), split=str(tmp_path / "split.json"), spacing=8.0, region=("whole",),
        label_map=("1=necrosis", "2=oedema", "4=enhancing"), unlabelled=str(tmp_path / "scans.csv"),
    )  # fmt: skip
    split = find_split(config, 1)[1]
    data = find_unlabelled(config, split)
    assert data is not None and data.scans(["flair"]) == [scans[4]]
    (found,) = load_unlabelled(config, data)
    assert found.id == "d" and found.label is None
    (tmp_path / "link").symlink_to(tmp_path / "data")
    other = find_unlabelled(replace(config, unlabelled=str(tmp_path / "link")), split)
    linked = [tmp_path / "link" / scan.relative_to(tmp_path / "data") for scan in scans[4:]]
    assert other is not None and other.scans(["flair"]) == linked
    visits = f"x,X,{scans[1]}\nx2,X,{scans[4]}\ny,Y,{scans[5]}\n"
    (tmp_path / "visits.csv").write_text(f"id,patient,flair\n{visits}")
    third = find_unlabelled(replace(config, unlabelled=str(tmp_path / "visits.csv")), split)
    assert third is not None and [case.id for case in third.cases] == ["y"]  # x is b, so x2 is of a test patient
    (tmp_path / "only.csv").write_text(f"id,flair\nx,{tmp_path}/link/{scans[1].relative_to(tmp_path / 'data')}\n")
    with pytest.raises(DataError, match="holds no scan beside those of the split"):
        find_unlabelled(replace(config, unlabelled=str(tmp_path / "only.csv")), split)


def test_scans_that_two_patients_share_are_refused(tmp_path):
    """Two raters without the column 'patient'; an atlas beside the scans, and cases to predict, may be shared."""
    for name in ("f1", "f2", "f3", "atlas", "l"):
        (tmp_path / f"{name}.nii.gz").touch()
    settings = SviConfig(
        root=str(tmp_path / "scans.csv"), label_map=("1=lesion",), validation=1, n=1, modality=("flair",)
    )

    def split(*rows: str, header: str = "id,flair,t1,label", **changes) -> None:
        (tmp_path / "scans.csv").write_text("\n".join([header, *rows]).replace("atlas", "atlas.nii.gz"))
        find_split(replace(settings, **changes), 1)

    others = ("c,f2.nii.gz,atlas,l.nii.gz", "d,f3.nii.gz,atlas,l.nii.gz")
    split("a,f1.nii.gz,atlas,l.nii.gz", "b,f1.nii.gz,atlas,", *others)
    raters = [f"{name},f1.nii.gz,atlas,l.nii.gz" for name in "ab"]
    with pytest.raises(
        DataError, match=r"cases 'a' and 'b' have the same scan .*f1\.nii\.gz, but not the same patient"
    ):
        split(*raters, *others)
    patients = [f"{row},{patient}" for row, patient in zip((*raters, *others), "ppqr", strict=True)]
    split(*patients, header="id,flair,t1,label,patient")
    with pytest.raises(DataError, match="cases 'a' and 'c' have the same scan"):
        split(*raters[:1], *others, modality=("t1",))


def test_scans_without_any_label_are_named(tmp_path):
    write_phantoms("ms", tmp_path, 2, shape=(20, 20, 20))
    for label in tmp_path.rglob("*consensus*"):
        label.unlink()
    with pytest.raises(DataError, match=f"{tmp_path}: no case has a label file"):
        find_split(SviConfig(root=str(tmp_path)), 1)


def test_a_modality_that_no_case_has_is_named(tmp_path, caplog):
    write_phantoms("ms", tmp_path, 3, shape=(20, 20, 20))
    settings = SviConfig(
        root=str(tmp_path), modality=("flair", "flare"), modality_dropout=0.2, spacing=3.0, validation=1
    )
    resolve(settings, 1)
    assert "no case has the modality 'flare', only flair, t1, t1ce, t2" in caplog.text and "'flair'," not in caplog.text
