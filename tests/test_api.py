"""The public names: each loads, and a five-line use of them works."""

import subprocess
import sys

import pyro
import torch
from monai.networks.nets import SegResNet
from pyro.infer import SVI, TraceMeanField_ELBO

import dwp_pyro
from dwp_pyro.distributions.kernel_prior import BlockCard
from dwp_pyro.models.blocks import BLOCKS


def test_every_public_name_loads():
    for name in dwp_pyro.__all__:
        assert getattr(dwp_pyro, name).__name__ == name


def test_importing_the_package_is_quick():
    code = "import sys, dwp_pyro; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_use_that_the_readme_shows():
    """A network of one's own, its kernels under a learned prior, driven by stock Pyro."""
    blocks = {name: dwp_pyro.KernelVAE([3, 3, 3], 2, (4,)) for name in BLOCKS}
    prior = dwp_pyro.KernelPrior("dwp", blocks, {name: BlockCard((), 0) for name in BLOCKS}).requires_grad_(False)
    network = SegResNet(init_filters=8, in_channels=4, out_channels=2)
    kernels = dwp_pyro.bayesianize(network, prior)
    model, guide = dwp_pyro.SegmentationModel(network, "dice-ce", num_cases=5), dwp_pyro.MeanFieldNormal(kernels)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    image, label = torch.randn(1, 4, 8, 8, 8), torch.ones(1, 1, 8, 8, 8)
    before = guide.means()["convInit.conv.weight"]
    svi.step(image, label, torch.ones_like(label))
    assert not torch.equal(before, guide.means()["convInit.conv.weight"])
