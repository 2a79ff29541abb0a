"""Headers of maps, and records of predictions."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwp_pyro.inference.decision import Decision
from dwp_pyro.prediction.outputs import read_prediction, save_like
from dwp_pyro.runtime.errors import PredictionOutdated
from dwp_pyro.runtime.files import write_json

AFFINE = np.array([[0, -2.0, 0, 30], [0, 0, 3.0, -20], [-2.5, 0, 0, 10], [0, 0, 0, 1]])


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2)])
@pytest.mark.parametrize("mirror", [1, -1])
def test_a_map_has_the_geometry_of_the_scan_and_nothing_else(tmp_path, kind, shape, mirror):
    affine = AFFINE @ np.diag([mirror, 1, 1, 1])
    scan = kind(np.ones(shape, np.int16), affine)
    scan.set_qform(affine, code=1)
    scan.set_sform(affine, code=4)
    scan.header.set_xyzt_units("mm", "sec")
    scan.header.set_intent("z score", name="Jane Doe")
    scan.header["descrip"] = scan.header["aux_file"] = b"Jane Doe"
    scan.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Patient: Jane Doe"))
    nibabel.save(scan, tmp_path / "scan.nii")
    save_like(tmp_path / "scan.nii", np.full((3, 4, 5), 0.5, np.float32), tmp_path / "map.nii")
    assert b"Jane" not in (tmp_path / "map.nii").read_bytes()
    saved = nibabel.load(tmp_path / "map.nii")
    np.testing.assert_allclose(saved.affine, affine)
    for (form, code), expected in ((saved.get_qform(coded=True), 1), (saved.get_sform(coded=True), 4)):
        np.testing.assert_allclose(form, affine, atol=1e-6)
        assert code == expected
    assert saved.header.get_zooms() == (2.5, 2.0, 3.0) and saved.header.get_xyzt_units() == ("mm", "sec")
    assert saved.header.get_intent()[0] == "none" and saved.get_fdata().max() == 0.5


def test_a_damaged_record_is_refused(tmp_path: Path):
    settings = {"posterior": "one", "decision": {"min_mass": 0.5}}
    metrics = {"volume_ml": 2.0, "pairwise_dice": None}
    whole = {"settings": settings, "regions": {"whole": metrics}}
    write_json(tmp_path / "a.json", whole)
    assert read_prediction(tmp_path, "a", ["whole"]) == ("one", Decision("half", 0.5), {"whole": metrics})
    for content in (
        {},
        whole | {"settings": None},
        whole | {"settings": settings | {"decision": {"other": 1}}},
        whole | {"regions": {"core": metrics}},
        whole | {"regions": {"whole": {"volume_ml": "two", "pairwise_dice": None}}},
    ):
        write_json(tmp_path / "a.json", content)
        with pytest.raises(PredictionOutdated, match=r"a\.json: is not the complete record of a prediction"):
            read_prediction(tmp_path, "a", ["whole"])
