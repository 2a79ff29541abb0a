"""Maps of several regions that do not belong together."""

import nibabel
import numpy as np
import pytest

from dwp_pyro.errors import DataError
from dwp_pyro.inference.posterior import NetworkCard
from dwp_pyro.pipeline.predict import read_maps


def test_maps_of_several_shapes_are_refused(tmp_path):
    card = NetworkCard(("t1",), ("anterior", "posterior"), ((1,), (2,)), "nnunet", None, (16, 16, 16))
    for region, side in (("anterior", 4), ("posterior", 5)):
        image = nibabel.Nifti1Image(np.zeros((side, 4, 4), np.float32), np.eye(4))
        nibabel.save(image, tmp_path / f"c_prob_{region}.nii.gz")
    with pytest.raises(DataError, match=r"c_prob_posterior.nii.gz: has another shape than c_prob_anterior.nii.gz"):
        read_maps(tmp_path, "c", "prob", card)
