"""Headers of maps, and the posterior of a prediction."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwp_pyro.prediction.outputs import check_posterior, save_like
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


def test_a_prediction_of_another_posterior_is_refused(tmp_path: Path):
    write_json(tmp_path / "a.json", {"settings": {"posterior": "one"}})
    check_posterior(tmp_path, "a", "one")
    for content in ({"settings": {"posterior": "other"}}, {"settings": None}, {}):
        write_json(tmp_path / "a.json", content)
        with pytest.raises(PredictionOutdated, match=r"a\.json: is of another posterior"):
            check_posterior(tmp_path, "a", "one")
