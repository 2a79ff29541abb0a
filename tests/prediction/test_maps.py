"""Maps of a prediction: shapes, and entropies on the grid of the scan."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.special import entr

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.inference.predictive import PredictiveMoments
from dwp_pyro.prediction import predict
from dwp_pyro.prediction.outputs import read_maps
from dwp_pyro.prediction.predict import predict_case
from dwp_pyro.priors.blocks import kernel_sites
from dwp_pyro.runtime.errors import PredictionOutdated


def test_maps_of_several_shapes_are_refused(tmp_path):
    network_config = NetworkConfig(("t1",), ("anterior", "posterior"), ((1,), (2,)), "nnunet", None, (16, 16, 16))
    for region, side in (("anterior", 4), ("posterior", 5)):
        image = nibabel.Nifti1Image(np.zeros((side, 4, 4), np.float32), np.eye(4))
        nibabel.save(image, tmp_path / f"c_prob_{region}.nii.gz")
    with pytest.raises(
        PredictionOutdated, match=r"c_prob_posterior.nii.gz: has another shape than c_prob_anterior.nii.gz"
    ):
        read_maps(tmp_path, "c", "prob", network_config)


def scan_and_network(folder: Path, spacing: float) -> tuple[DataSet, NetworkConfig]:
    """Return a scan of 3 mm and the configuration of a small network of other voxels."""
    write_phantoms("brats", folder, 1, shape=(28, 32, 28))
    form = NetworkConfig(("flair",), ("whole",), ((1, 2, 4),), "brats", spacing, (16, 16, 16), widths=(2, 2, 3, 3))
    return open_dataset(folder, "brats"), form


def test_entropy_is_that_of_the_probability_on_the_grid_of_the_scan(tmp_path):
    """It is not interpolated, although the network's voxels have another size than those of the scan."""
    data, network_config = scan_and_network(tmp_path, 2.3)
    torch.manual_seed(0)
    network = network_config.build()
    torch.nn.init.normal_(network.output.weight, std=3)
    posterior = Posterior(network_config, [Member(network, MeanFieldNormal(kernel_sites(network), 0.3))])
    found = predict_case(posterior, data.cases[0], data, PredictConfig(samples=3), torch.device("cpu"))
    p = found.probability.astype(np.float64)
    np.testing.assert_allclose(found.entropy, entr(p) + entr(1 - p), atol=1e-5)
    assert found.entropy.max() > 0.6
    assert (found.mutual_information >= 0).all() and (found.mutual_information <= found.entropy + 1e-6).all()
    assert found.mutual_information.max() > 0.05


def test_borders_are_no_disagreement(tmp_path):
    """A single pass agrees with itself, also where its sharp borders are interpolated to smaller voxels."""
    data, network_config = scan_and_network(tmp_path, 9.0)
    torch.manual_seed(0)
    network = network_config.build()
    torch.nn.init.normal_(network.output.weight, std=30)
    posterior = Posterior(network_config, [Member(network, None)])
    found = predict_case(posterior, data.cases[0], data, PredictConfig(samples=0), torch.device("cpu"))
    assert found.entropy.max() > 0.6
    assert found.mutual_information.max() < 1e-5


@pytest.mark.parametrize(("overlap", "windows"), [(0.0, 8), (0.25, 12), (0.75, 60)])
def test_windows_overlap_by_the_setting(tmp_path, monkeypatch, overlap, windows):
    """Windows of 16³ voxels are (1 - overlap) · 16 apart in a brain of 24×29×25, and cover its border."""
    data, network_config = scan_and_network(tmp_path, 3.0)
    logits, sizes = Posterior.logits, []

    def count(self, images, *rest):
        sizes.append(len(images))
        return logits(self, images, *rest)

    monkeypatch.setattr(Posterior, "logits", count)
    posterior = Posterior(network_config, [Member(network_config.build(), None)])
    predict_case(posterior, data.cases[0], data, PredictConfig(samples=0, overlap=overlap), torch.device("cpu"))
    assert sum(sizes) == windows


def test_doubtful_voxels_of_the_network_are_no_lesion_on_a_finer_grid(tmp_path, monkeypatch):
    """Eight of p = 0.15, which interpolation makes hundreds of."""

    def predicted(posterior, image, *rest):
        probability = torch.zeros(1, *image.shape[1:])
        probability[:, 3:5, 3:5, 3:5] = 0.15
        return PredictiveMoments(probability, torch.zeros_like(probability), (float("nan"),))

    monkeypatch.setattr(predict, "posterior_predictive", predicted)
    data, network_config = scan_and_network(tmp_path, 9.0)
    posterior = Posterior(network_config, [Member(network_config.build(), None)])
    posterior.decision = Decision("expected-dice")
    found = predict_case(posterior, data.cases[0], data, PredictConfig(samples=0), torch.device("cpu"))
    assert found.probability.max() > 0.1 and not found.masks.any()
    assert network_config.masks(found.probability, posterior.decision, None).any()
