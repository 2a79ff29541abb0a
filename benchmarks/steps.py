"""Step of stochastic variational inference against a step of the same deterministic network.

$ python -m benchmarks.steps [--device cuda] [--batch 4]

All sides are in one process and interleaved with their reference. Deterministic: the network and loss of the package
with plain weights and one fused AdamW, without Pyro. Stock: the same with PyTorch's own convolutions and norms. Both
run with the process settings of the command line (freed memory is kept, threads spin briefly); stock PyTorch is slower
without them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from benchmarks.comparison import Row, chosen, ratio, report, time_in_turns
from dwp_pyro.config.names import LEARNED
from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.inference.optimization import pyro_svi
from dwp_pyro.models.bayesianize import SitePrior, bayesianize
from dwp_pyro.models.likelihoods import dice_ce
from dwp_pyro.models.ops.conv3d import Conv3d
from dwp_pyro.models.ops.instance_norm import InstanceNorm3d
from dwp_pyro.models.segmentation import SegmentationModel, autocast
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import BLOCKS, kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.priors.prior_scales import PriorScales
from dwp_pyro.runtime.cuda_graph import GraphedCallable, capturable_step
from dwp_pyro.runtime.device import has_bfloat16
from dwp_pyro.runtime.non_finite_guard import NonFiniteGuard

Step = Callable[[], object]

DEFAULT, SMALL = (16, 32, 64, 128), (8, 16, 32, 64)

#: Device type → widths and sides of the patch.
SIZES = {"cpu": ((DEFAULT, 64), (SMALL, 48)), "cuda": ((DEFAULT, 128), (SMALL, 128))}

DWP = "`weight-sample`, DWP, all kernels, K = 1"

#: Side → prior, estimator, and targets for the default and the small size.
SIDES = {
    "`weight-sample`, N(0, 1)": ("normal", "weight-sample", 1.25, 1.40),
    "`weight-sample`, log-uniform": ("log-uniform", "weight-sample", 1.25, 1.40),
    "`weight-sample`, isotropic": ("isotropic", "weight-sample", 1.25, 1.40),
    "`weight-sample`, full-covariance Gaussian": ("gaussian", "weight-sample", 1.25, 1.40),
    DWP: ("dwp", "weight-sample", 1.40, 1.70),
    "`local`, DWP, all kernels, K = 1": ("dwp", "local", 2.6, 2.9),
}


def untrained_prior() -> KernelPrior:
    """Return default VAEs for every block of the network; training does not change their cost."""
    torch.manual_seed(0)
    blocks = prior_blocks(ResidualUNet3d(1, 2))
    block_infos = {
        name: BlockInfo(tuple(site for site, block in blocks.items() if block == name), 0) for name in BLOCKS
    }
    prior = KernelPrior("dwp", {block: KernelVAE((3, 3, 3)) for block in block_infos}, block_infos)
    return prior.requires_grad_(False)


class Scene:
    """Architecture of a network, and a random batch of patches."""

    def __init__(self, widths: tuple[int, int, int, int], patch: int, device: torch.device, batch: int = 1) -> None:
        self.widths, self.patch, self.device = widths, patch, device
        torch.manual_seed(0)
        size = (batch, 1, patch, patch, patch)
        image, label = torch.randn(size), (torch.rand(size) > 0.8).long()
        self.batch = tuple(x.to(device) for x in (image, label, torch.ones(size)))

    def network(self) -> ResidualUNet3d:
        torch.manual_seed(0)
        return ResidualUNet3d(1, 2, self.widths).to(self.device)

    def deterministic(self, precision: str = "float32") -> Step:
        """Return a step, on a GPU captured as one graph; a Bayesian step has two."""
        step = self._plain(self.network(), precision)
        if self.device.type == "cuda":
            step = GraphedCallable(step, self.device)
        return lambda: step().item()

    def stock(self) -> Step:
        network = self.network()
        for module in network.modules():
            for ours, theirs in ((Conv3d, nn.Conv3d), (InstanceNorm3d, nn.InstanceNorm3d)):
                if isinstance(module, ours):
                    module.__class__ = theirs
        step = self._plain(network, "float32")
        return lambda: step().item()

    def _plain(self, network: nn.Module, precision: str) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        take_step = partial(capturable_step, optimizer) if self.device.type == "cuda" else optimizer.step
        image, *truth = self.batch

        def step() -> Tensor:
            with autocast(precision, self.device):
                logits = network(image)
            loss = -dice_ce(logits.float(), *truth).sum()
            loss.backward()
            take_step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def bayesian(self, name: str, estimator: str, precision: str = "float32") -> Step:
        """Return a step as in `dwp-pyro svi`."""
        network = self.network()
        sites = kernel_sites(network)
        blocks = prior_blocks(network)
        modules: dict[str, nn.Module] = {}
        priors: dict[str, SitePrior] = {
            site: make_prior(name, site, w) for site, w in sites.items() if name not in LEARNED
        }
        units = {}
        if name in LEARNED:
            learned = untrained_prior().to(self.device).as_family(name)
            scales = PriorScales(dict.fromkeys(blocks.values(), 1_000_000), 0.3)
            modules = {"kernel_prior": learned, "scales": scales}
            blocks_at = {site: learned.block_at(site, w.shape) for site, w in sites.items()}
            units = {
                site: block.root_mean_square() if name == "isotropic" else block.scale_tril
                for site, block in blocks_at.items()
            }

            def prior(site: str, center: Tensor) -> TorchDistribution:
                return make_prior(name, site, center, learned, center=center, scale=scales.scale(blocks[site]))

            priors = {site: partial(prior, site, w.detach().clone()) for site, w in sites.items()}
        if estimator == "local":
            units = {site: unit.diagonal() for site, unit in units.items()}
        model = SegmentationModel(network, "dice-ce", 5, 1e5, modules, precision=precision).to(self.device)
        guide = MeanFieldNormal(bayesianize(network, priors), 1e-3, units).to(self.device)
        parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        svi = pyro_svi(model, guide, NonFiniteGuard(optimizer), MeanFieldELBO())

        def step() -> float:
            with LocalReparameterization(guide.posterior) if estimator == "local" else nullcontext():
                return svi.step(*self.batch)

        return step


def rows(device: torch.device, batch: int = 1) -> Iterator[Row]:
    """Yield rows per widths and patch."""
    for widths, patch in SIZES[device.type]:
        small = widths == SMALL
        scene = Scene(widths, patch, device, batch)
        where = f"widths {'-'.join(map(str, widths))}, {f'{batch} × ' if batch > 1 else ''}{patch}³"
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            # Repeat the reference for each side: the speed of the machine may change within a minute.
            deterministic, stock = scene.deterministic(), scene.stock()
            for what, (*arguments, target, small_target) in SIDES.items():
                sides = {"deterministic": deterministic, "ours": scene.bayesian(*arguments)}
                if what == DWP:
                    sides["stock"] = stock
                limit = small_target if small else target
                seconds = time_in_turns(sides, 70 if small else 30, device)
                note = "; ".join(f"{side} {statistics.median(each) * 1e3:.0f} ms" for side, each in seconds.items())
                metrics = ratio(seconds["ours"], seconds["deterministic"])
                yield Row(f"SVI step, {what}; {where}", "deterministic step", limit, *metrics, note)
                if what == DWP:
                    metrics = ratio(seconds["ours"], seconds["stock"])
                    yield Row(f"SVI step, {what}; {where}", "stock step, float32", 1.0, *metrics, note)
            if has_bfloat16(device):
                sides = {
                    "stock": stock,
                    "ours": scene.bayesian("dwp", "weight-sample", "bf16"),
                    "deterministic in bf16": scene.deterministic("bf16"),
                }
                seconds = time_in_turns(sides, 50 if small else 25, device)
                note = "; ".join(f"{side} {statistics.median(each) * 1e3:.0f} ms" for side, each in seconds.items())
                what = f"{DWP}, bf16"
                metrics = ratio(seconds["ours"], seconds["stock"])
                yield Row(f"SVI step, {what}; {where}", "stock step, float32", 1.0, *metrics, note)


if __name__ == "__main__":
    arguments = chosen(batch=1)
    report(rows(arguments.device, arguments.batch))
