"""GPU against CPU; run by -m gpu. Other tests see no GPU."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI

from dwp_pyro.config.names import LEARNED
from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.inference.optimization import OneOptimizer, pyro_svi
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.ops.instance_norm import InstanceNorm3d
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.runtime.device import torch_device
from dwp_pyro.runtime.non_finite_guard import NonFiniteGuard
from dwp_pyro.runtime.tensors import load_tensors
from dwp_pyro.training.metrics_log import MetricsLog
from tests.conftest import random_density
from tests.world import TINY, World, call

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

GPU = torch.device("cuda")


@pytest.mark.parametrize("prior", ["normal", "log-uniform", "gaussian", "mixture", "flow", "dwp"])
def test_the_elbo_and_its_gradient_equal_those_on_the_cpu(prior, monkeypatch):
    """In double precision, without TF32, with the noise of the CPU and kernels of one block."""
    randn, generator = torch.randn, torch.Generator()

    def noise(*shape, dtype=torch.float32, device=None, **_):
        return randn(*shape, dtype=torch.double, generator=generator).to(device, dtype)

    monkeypatch.setattr(torch, "randn", noise)
    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal",
        lambda shape, dtype, device: noise(*shape, dtype=dtype, device=device),
    )
    torch.manual_seed(0)
    network = ResidualUNet3d(1, 2, (4, 4, 8, 8)).double()
    learned = None
    if prior in LEARNED:
        density = KernelVAE((3, 3, 3), 2).double() if prior == "dwp" else random_density(prior)
        for parameter in density.parameters():
            parameter.data.normal_(std=0.1)
        blocks = prior_blocks(network)
        learned = KernelPrior(prior, {"all": density}, {"all": BlockInfo(tuple(blocks), 1)}).requires_grad_(False)
    weights = {site: kernel.detach().clone() for site, kernel in kernel_sites(network).items()}
    state = network.state_dict()
    image = noise(1, 1, 16, 16, 16, dtype=torch.double)
    data = (image, (image > 0.5).long(), torch.ones_like(image))
    results = []
    for device in (torch.device("cpu"), GPU):
        network = ResidualUNet3d(1, 2, (4, 4, 8, 8)).double()
        network.load_state_dict(state)
        around = {site: {"center": w.to(device), "scale": 0.5} if learned else {} for site, w in weights.items()}
        placed = learned.to(device) if learned else None
        network = network.to(device)
        priors = {s: make_prior(prior, s, w.to(device), placed, **around[s]) for s, w in weights.items()}
        bayesianize(network, priors)
        guide = MeanFieldNormal(weights, 0.05).to(device)
        model = SegmentationModel(network, "dice-ce", 1, 4096.0).to(device)
        generator.manual_seed(0)
        loss = MeanFieldELBO().differentiable_loss(model, guide, *(part.to(device) for part in data))
        loss.backward()
        results.append((loss, {name: p.grad for name, p in guide.named_parameters()}))
    (cpu_loss, cpu_gradients), (gpu_loss, gpu_gradients) = results
    assert gpu_loss.device.type == "cuda"
    assert gpu_loss.item() == pytest.approx(cpu_loss.item(), rel=1e-9)
    for name, gradient in cpu_gradients.items():
        torch.testing.assert_close(gpu_gradients[name].cpu(), gradient, rtol=1e-6, atol=1e-8)


def test_instance_norm_on_the_gpu():
    """The norm of a single voxel is 0, where PyTorch raises an error."""
    x = torch.randn(1, 4, 8, 8, 8, device=GPU)
    torch.testing.assert_close(InstanceNorm3d(4)(x), torch.nn.InstanceNorm3d(4)(x))
    voxel = torch.randn(1, 4, 1, 1, 1, device=GPU)
    assert not InstanceNorm3d(4)(voxel).any()
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        torch.nn.InstanceNorm3d(4)(voxel)


@pytest.mark.parametrize(
    ("prior", "estimator"),
    [
        (None, "weight-sample"),
        ("normal", "weight-sample"),
        ("normal", "local"),
        ("log-uniform", "weight-sample"),
        ("gaussian", "weight-sample"),
        ("mixture", "weight-sample"),
        ("flow", "weight-sample"),
        ("dwp", "weight-sample"),
    ],
)
def test_captured_steps_equal_those_of_stock_svi(prior, estimator):
    """Each step has another batch, β, learning rate and seed, and one is skipped; in double precision."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        network = ResidualUNet3d(1, 2, (4, 4, 8, 8)).double()
        guide = learned = None
        if prior is not None:
            sites = kernel_sites(network)
            if prior in LEARNED:
                density = KernelVAE((3, 3, 3), 2).double() if prior == "dwp" else random_density(prior)
                for parameter in density.parameters():
                    parameter.data.normal_(std=0.1)
                block_infos = {"all": BlockInfo(tuple(sites), 1)}
                learned = KernelPrior(prior, {"all": density}, block_infos).requires_grad_(False).to(GPU)
            network.to(GPU)
            # Only the DWP is centered on the network, narrower, with three particles.
            center = {s: w.detach().clone() if prior == "dwp" else None for s, w in kernel_sites(network).items()}
            more = {"scale": 0.5, "particles": 3} if prior == "dwp" else {}
            priors = {s: make_prior(prior, s, w, learned, center=center[s], **more) for s, w in sites.items()}
            guide = MeanFieldNormal(bayesianize(network, priors))
            guide.to(GPU)
        model = SegmentationModel(
            network, "dice-ce", 1, 4096.0, {"kernel_prior": learned} if learned else {}, 0.1 if guide is None else 0.0
        ).to(GPU)
        parameters = [p for p in (*model.parameters(), *(guide.parameters() if guide else ())) if p.requires_grad]
        rate, beta = torch.zeros((), device=GPU), torch.zeros((), device=GPU)
        steps = NonFiniteGuard(torch.optim.AdamW(parameters, lr=rate, fused=True))
        elbo = MeanFieldELBO(beta)
        if captured:
            svi = pyro_svi(model, guide, steps, elbo)
        else:
            svi = SVI(model, guide or (lambda *batch: {}), OneOptimizer(steps, elbo), elbo)
        reports = []
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            for step in range(6):
                torch.manual_seed(100 + step)
                image = torch.randn(1, 1, 16, 16, 16, dtype=torch.double)
                truth = ((image > 0.5).long(), torch.ones_like(image))
                if step == 3:
                    image[0, 0, 0, 0, 0] = math.nan
                rate.fill_(0.01 / (step + 1))
                beta.fill_(0.2 * (step + 1))
                with LocalReparameterization(guide.posterior) if estimator == "local" else nullcontext():
                    loss = svi.step(*(part.to(GPU) for part in (image, *truth)))
                reports.append([loss, *(float(term) for term in elbo.terms.values()), steps.skipped])
        results.append((reports, [p.detach().cpu() for p in parameters]))
    (stock_reports, stock), (our_reports, ours) = results
    assert [step[-1] for step in stock_reports] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(our_reports, stock_reports, rtol=1e-8)
    assert len({loss for loss, *_ in stock_reports}) == 6
    for one, other in zip(stock, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("network", ["segresnet", "unet", "dynunet", "basicunet", "mednext"])
def test_steps_of_a_monai_network_are_captured(world, tmp_path, network):
    """In a command the first step runs eagerly, the second is captured, two are replayed."""
    form = ("--network", network, "--widths", "8,16,32,64", "--patch", 32, "--spacing", 4, "--validation", 1)
    brats = ("svi", "--root", world.path / "data/brats", "--n", 2, *form, "--steps", 4, "--device", "cuda")
    result = call(*brats, "--prior", "normal", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output


def test_auto_selects_the_gpu():
    assert torch_device("auto").type == "cuda"


@pytest.fixture(scope="module")
def on_the_gpu(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every command; `world` was made on the GPU, too, since "auto" selects it."""
    out = tmp_path_factory.mktemp("gpu")
    # A high learning rate makes the few steps of a test matter.
    brats = ("--root", world.path / "data/brats", "--n", 2, *TINY, "--learning-rate", 0.05, "--device", "cuda")
    prior = ("--prior-dir", world.path / "runs/prior-ms")
    for name, command in {
        "dwp": ("svi", *brats, *prior, "--members", 2),
        "bf16": ("svi", *brats, *prior, "--precision", "bf16"),
        "local": ("svi", *brats, *prior, "--estimator", "local"),
        # Enough steps for batches to be made and pinned while the second step is captured.
        "log-uniform": ("svi", *brats, "--prior", "log-uniform", "--steps", 30),
        "random": ("finetune", *brats, "--init", "random"),
    }.items():
        result = call(*command, "--out", out / name)
        assert result.exit_code == 0, result.output
    return out


def test_every_kind_of_run_is_evaluated_and_reported(on_the_gpu):
    for name in ("dwp", "bf16", "local", "log-uniform", "random"):
        result = call("evaluate", on_the_gpu / name, "--samples", 2, "--device", "cuda")
        assert result.exit_code == 0, result.output
        rows = list(csv.DictReader((on_the_gpu / name / "evaluation.csv").read_text().splitlines()))
        assert rows and all(math.isfinite(float(row["nll"])) for row in rows), name


@pytest.mark.parametrize("name", ["dwp", "random"])
def test_maps_of_the_gpu_agree_with_those_of_the_cpu(world, on_the_gpu, tmp_path, name):
    """Weight samples are the same on both; convolutions on the GPU round to TF32, 10 bits."""
    for device in ("cpu", "cuda"):
        scans = (world.path / "data/two", "--samples", 4, "--device", device, "--out", tmp_path / device)
        result = call("predict", on_the_gpu / name, *scans)
        assert result.exit_code == 0, result.output
    here = sorted((tmp_path / "cpu").glob("*_prob.nii.gz"))
    assert len(here) == 2
    for path in here:
        one, other = (np.asarray(nibabel.load(tmp_path / device / path.name).dataobj) for device in ("cpu", "cuda"))
        np.testing.assert_allclose(one, other, atol=0.01)
        assert np.ptp(one[one > 0]) > 0.1  # 0 outside the brain


def test_nan_in_the_output_of_a_network_is_reported(world, on_the_gpu, tmp_path, monkeypatch):
    """The GPU can be used after the error."""
    logits = Posterior.logits
    with monkeypatch.context() as patch:
        patch.setattr(Posterior, "logits", lambda *arguments: logits(*arguments) * torch.inf)
        result = call(
            "predict", on_the_gpu / "dwp", world.path / "data/two", "--device", "cuda", "--out", tmp_path / "a"
        )
    assert result.exit_code == 2 and "NaN" in result.output
    result = call("predict", on_the_gpu / "dwp", world.path / "data/two", "--device", "cuda", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output


def test_the_memory_of_captured_steps_is_freed(world, tmp_path):
    """Memory is freed without waiting for the garbage collector, since the next member needs it."""
    run = ("svi", "--root", world.path / "data/brats", "--n", 2, *TINY, "--prior", "normal", "--device", "cuda")
    in_use = []
    gc.disable()
    try:
        for number in range(3):
            assert call(*run, "--out", tmp_path / str(number)).exit_code == 0
            torch.cuda.empty_cache()
            in_use.append(torch.cuda.memory_reserved())
    finally:
        gc.enable()
    assert in_use[2] <= in_use[1] + 2**21


def test_stopped_and_resumed(world, tmp_path, monkeypatch):
    """Sums on a GPU have no fixed order, so two runs are close but not identical."""
    brats = ("--root", world.path / "data/brats", "--n", 2, *TINY, "--learning-rate", 0.05)
    run = ("svi", *brats, "--prior", "normal", "--device", "cuda")
    log = MetricsLog.__call__

    def stop(self, at, metrics):
        log(self, at, metrics)
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "__call__", stop)
        stopped = call(*run, "--out", tmp_path / "run")
    assert stopped.exit_code == 128 + signal.SIGTERM, stopped.output
    resumed = call(*run, "--out", tmp_path / "run", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert call(*run, "--out", tmp_path / "whole").exit_code == 0
    one, other = (load_tensors(tmp_path / name / "posterior.safetensors")[0] for name in ("whole", "run"))
    for name, tensor in one.items():
        # Compare means: Adam makes a full step of a gradient that is pure rounding error.
        assert (other[name] - tensor).abs().mean() < 0.002, name


def test_memory_of_the_gpu_does_not_grow_with_samples(world, on_the_gpu, tmp_path):
    peaks = []
    for samples in (2, 2, 8):
        torch.cuda.reset_peak_memory_stats()
        scans = (world.path / "data/two", "--samples", samples, "--out", tmp_path / "maps", "--overwrite")
        result = call("predict", on_the_gpu / "dwp", *scans, "--device", "cuda")
        assert result.exit_code == 0, result.output
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.02 * peaks[1]


def test_too_little_gpu_memory_is_reported(world, tmp_path):
    """The command prints one line and exits with code 2."""
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        scans = ("--root", world.path / "data/brats", "--n", 2, "--widths", "64,128,256,512", "--validation", 1)
        result = call("svi", *scans, "--prior", "normal", "--device", "cuda", "--out", tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.exit_code == 2, result.output
    assert "out of memory" in result.output and "Traceback" not in result.output


def test_a_prior_of_the_gpu_is_read_on_the_cpu(world):
    prior = world.path / "runs/prior-ms"
    assert json.loads((prior / "run.json").read_text())["finished"]
    result = call("score-prior", prior, "--kernels", prior / "kernels.safetensors", "--samples", 2)
    assert result.exit_code == 0, result.output


def test_unlabelled_scans_are_labeled_on_the_gpu(in_world, tmp_path):
    command = ("svi", "--dataset", "brats", "--n", 2, *TINY, "--members", 1, "--unlabelled", "data/two")
    result = call(*command, "--device", "cuda", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
