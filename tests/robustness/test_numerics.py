"""Limits of rounding errors, and reproducibility."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dwp_pyro.config.names import LEARNED
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior
from tests.conftest import random_density
from tests.world import TINY


@pytest.mark.parametrize("prior", ["normal", "log-uniform", "gaussian", "mixture", "flow", "dwp"])
def test_the_elbo_in_single_precision_equals_that_in_double(linear_gaussian, monkeypatch, prior):
    """Use the same noise in both."""
    randn, generator = torch.randn, torch.Generator()

    def noise(*shape, dtype=torch.float32, device=None, **_):
        return randn(*shape, dtype=torch.double, generator=generator).to(dtype)

    monkeypatch.setattr(torch, "randn", noise)
    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal", lambda shape, dtype, device: noise(*shape, dtype=dtype)
    )
    torch.manual_seed(0)
    network = ResidualUNet3d(1, 2, (8, 16, 32, 64)).double()
    learned = None
    if prior in LEARNED:
        density = linear_gaussian((3, 3, 3), 2)[0] if prior == "dwp" else random_density(prior)
        blocks = prior_blocks(network)
        learned = KernelPrior(prior, {"all": density}, {"all": BlockInfo(tuple(blocks), 1)}).requires_grad_(False)
    weights = {site: kernel.detach().clone() for site, kernel in kernel_sites(network).items()}
    state = network.state_dict()
    image = noise(2, 1, 32, 32, 32, dtype=torch.double)
    losses = []
    for dtype in (torch.float64, torch.float32):
        copy = ResidualUNet3d(1, 2, (8, 16, 32, 64)).to(dtype)
        copy.load_state_dict(state)
        if learned is not None:
            learned.to(dtype)
        priors = {
            site: make_prior(prior, site, weight.to(dtype), learned, center=weight.to(dtype), scale=0.5)
            if learned is not None
            else make_prior(prior, site, weight.to(dtype))
            for site, weight in weights.items()
        }
        guide = MeanFieldNormal(bayesianize(copy, priors), 0.01).to(dtype)
        model = SegmentationModel(copy, "dice-ce", 5, 32.0**3).to(dtype)
        data = image.to(dtype)
        generator.manual_seed(1)
        losses.append(MeanFieldELBO().loss(model, guide, data, (data > 1).long(), torch.ones_like(data)))
    assert abs(losses[1] - losses[0]) < 2e-6 * abs(losses[0]), losses  # other noise changes it more


SVI = ("svi", "--n", "2", *TINY, "--members", "2")
FIT_PRIOR = ("fit-prior", *TINY, "--bootstraps", "1", "--density-steps", "20")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "threads"), [(SVI, "1"), (SVI, "2"), (FIT_PRIOR, "2")])
def test_the_same_seed_and_threads_give_identical_results(copy_of_world, command, threads):
    """Use two processes with different hash seeds, which change the order of sets."""
    runs = []
    for seed in ("1", "2"):
        out = copy_of_world / f"run{seed}"
        line = [sys.executable, "-c", "from dwp_pyro.cli import main; main()", *command, "--out", str(out)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        subprocess.run(line, check=True, env=environment, capture_output=True)
        runs.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert runs[0] and runs[0] == runs[1]
