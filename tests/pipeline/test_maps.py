"""Maps of several regions that do not belong together."""

import nibabel
import numpy as np
import pytest
import torch
from scipy.special import entr

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.errors import DataError
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.models.blocks import kernel_sites
from dwp_pyro.pipeline.predict import predict_case, read_maps


def test_maps_of_several_shapes_are_refused(tmp_path):
    card = NetworkCard(("t1",), ("anterior", "posterior"), ((1,), (2,)), "nnunet", None, (16, 16, 16))
    for region, side in (("anterior", 4), ("posterior", 5)):
        image = nibabel.Nifti1Image(np.zeros((side, 4, 4), np.float32), np.eye(4))
        nibabel.save(image, tmp_path / f"c_prob_{region}.nii.gz")
    with pytest.raises(DataError, match=r"c_prob_posterior.nii.gz: has another shape than c_prob_anterior.nii.gz"):
        read_maps(tmp_path, "c", "prob", card)


def test_entropy_is_that_of_the_probability_on_the_grid_of_the_scan(tmp_path):
    """Not an interpolated one, with voxels of another size than the scan's."""
    write_phantoms("brats", tmp_path, 1, shape=(28, 32, 28))
    data = open_dataset(tmp_path, "brats")
    card = NetworkCard(("flair",), ("whole",), ((1, 2, 4),), "brats", 2.3, (16, 16, 16), widths=(2, 2, 3, 3))
    torch.manual_seed(0)
    network = card.build()
    torch.nn.init.normal_(network.output.weight, std=3)
    posterior = Posterior(card, [Member(network, MeanFieldNormal(kernel_sites(network), 0.3))])
    found = predict_case(posterior, data.cases[0], data, PredictConfig(samples=3), torch.device("cpu"))
    p = found.probability.astype(np.float64)
    np.testing.assert_allclose(found.entropy, entr(p) + entr(1 - p), atol=1e-5)
    assert found.entropy.max() > 0.6
    assert (found.mutual_information >= 0).all() and (found.mutual_information <= found.entropy + 1e-6).all()
    assert found.mutual_information.max() > 0.05
