"""The public names: each loads, and a five-line use of them works."""

import subprocess
import sys

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

import dwp_pyro


def test_every_public_name_loads():
    for name in dwp_pyro.__all__:
        assert getattr(dwp_pyro, name).__name__ == name


def test_importing_the_package_is_quick():
    code = "import sys, dwp_pyro; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_use_that_the_readme_shows():
    """A network of one's own, its kernels under a deep weight prior, driven by stock Pyro."""
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 2, 1))
    prior = dwp_pyro.DeepWeightPrior(dwp_pyro.KernelVAE([3, 3, 3]).requires_grad_(False))
    kernels = dwp_pyro.bayesianize(network, {"0.weight": prior.expand([4, 1]).to_event(2)})
    model, guide = dwp_pyro.SegmentationModel(network, "dice-ce", num_cases=5), dwp_pyro.MeanFieldNormal(kernels)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    image, label = torch.randn(1, 1, 8, 8, 8), torch.ones(1, 1, 8, 8, 8).long()
    before = guide.means()["0.weight"]
    svi.step(image, label, torch.ones_like(image), torch.tensor([512.0]))
    assert not torch.equal(before, guide.means()["0.weight"])
