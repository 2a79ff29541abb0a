"""One step of stochastic variational inference against one step of the same deterministic network.

$ python -m benchmarks.steps [--device cuda] [--batch 4]

All sides are in one process; each takes turns with what it is compared with. Deterministic: the package's network, its
weights plain tensors, its loss and one fused AdamW, nothing of Pyro. Stock: the same with PyTorch's own convolutions
and norms. Both have the process's settings, which the command line makes (freed memory kept, threads that wait a
little), so that stock PyTorch without them is slower than it is here.
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
from dwp_pyro.distributions.kernel_prior import BlockCard, KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.distributions.prior_scales import PriorScales
from dwp_pyro.distributions.priors import LEARNED, prior_at
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.cuda_graph import Recorded, step_recordably
from dwp_pyro.inference.device import has_bfloat16
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.finite_steps import FiniteSteps
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.inference.svi import pyro_svi
from dwp_pyro.models.bayesian import SitePrior, bayesianize
from dwp_pyro.models.blocks import BLOCKS, kernel_sites, prior_blocks
from dwp_pyro.models.convolution import Conv3d
from dwp_pyro.models.instance_norm import InstanceNorm3d
from dwp_pyro.models.likelihoods import dice_ce
from dwp_pyro.models.segmentation import SegmentationModel, in_precision
from dwp_pyro.models.unet import ResidualUNet3d

Step = Callable[[], object]

DEFAULT, SMALL = (16, 32, 64, 128), (8, 16, 32, 64)

#: Kind of device → widths and sides of the patch.
SIZES = {"cpu": ((DEFAULT, 64), (SMALL, 48)), "cuda": ((DEFAULT, 128), (SMALL, 128))}

DWP = "`shared`, DWP, all kernels, K = 1"

#: Side → (prior, estimator), targets at the default size and at the small one.
SIDES = {
    "`shared`, N(0, 1)": ("normal", "shared", 1.25, 1.40),
    "`shared`, log-uniform": ("log-uniform", "shared", 1.25, 1.40),
    "`shared`, full-covariance Gaussian": ("gaussian", "shared", 1.25, 1.40),
    DWP: ("dwp", "shared", 1.40, 1.70),
    "`local`, DWP, all kernels, K = 1": ("dwp", "local", 2.6, 2.9),
}


def untrained_prior() -> KernelPrior:
    """VAEs of the default form, for every block of the network: what they have learned does not change their cost."""
    torch.manual_seed(0)
    blocks = prior_blocks(ResidualUNet3d(1, 2))
    cards = {name: BlockCard(tuple(site for site, block in blocks.items() if block == name), 0) for name in BLOCKS}
    prior = KernelPrior("dwp", {block: KernelVAE((3, 3, 3)) for block in cards}, cards)
    return prior.requires_grad_(False)


class Scene:
    """A network's form and a batch of patches, at random."""

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
        """On a GPU recorded as one graph: a Bayesian step is two."""
        step = self._plain(self.network(), precision)
        if self.device.type == "cuda":
            step = Recorded(step, self.device)
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
        take_step = partial(step_recordably, optimizer) if self.device.type == "cuda" else optimizer.step
        image, *truth = self.batch

        def step() -> Tensor:
            with in_precision(precision, self.device):
                logits = network(image)
            loss = -dice_ce(logits.float(), *truth).sum()
            loss.backward()
            take_step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def bayesian(self, name: str, estimator: str, precision: str = "float32") -> Step:
        """A step as `dwp-pyro svi` takes it."""
        network = self.network()
        sites = kernel_sites(network)
        blocks = prior_blocks(network)
        modules: dict[str, nn.Module] = {}
        priors: dict[str, SitePrior] = {
            site: prior_at(name, site, w) for site, w in sites.items() if name not in LEARNED
        }
        units = {}
        if name in LEARNED:
            learned = untrained_prior().to(self.device).of_family(name)
            scales = PriorScales(dict.fromkeys(blocks.values(), 1_000_000), 0.3)
            modules = {"kernel_prior": learned, "scales": scales}
            units = {site: learned.block_at(site, w.shape).scale_tril for site, w in sites.items()}

            def prior(site: str, center: Tensor) -> TorchDistribution:
                return prior_at(name, site, center, learned, centre=center, scale=scales.scale(blocks[site]))

            priors = {site: partial(prior, site, w.detach().clone()) for site, w in sites.items()}
        if estimator == "local":
            units = {site: unit.diagonal() for site, unit in units.items()}
        model = SegmentationModel(network, "dice-ce", 5, 1e5, modules, precision=precision).to(self.device)
        guide = MeanFieldNormal(bayesianize(network, priors), 1e-3, units).to(self.device)
        parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        svi = pyro_svi(model, guide, FiniteSteps(optimizer), MeanFieldELBO())

        def step() -> float:
            with LocalReparameterization(guide.posterior) if estimator == "local" else nullcontext():
                return svi.step(*self.batch)

        return step


def rows(device: torch.device, batch: int = 1) -> Iterator[Row]:
    """Rows for each widths and patch; the targets of the small widths are their own."""
    keep_freed_memory()
    for widths, patch in SIZES[device.type]:
        small = widths == SMALL
        scene = Scene(widths, patch, device, batch)
        where = f"widths {'-'.join(map(str, widths))}, {f'{batch} × ' if batch > 1 else ''}{patch}³"
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            # Beside each side its own turns of what it is compared with: the machine may be another a minute later.
            deterministic, stock = scene.deterministic(), scene.stock()
            for what, (*arguments, target, small_target) in SIDES.items():
                sides = {"deterministic": deterministic, "ours": scene.bayesian(*arguments)}
                if what == DWP:
                    sides["stock"] = stock
                limit = small_target if small else target
                # Steps vary by a tenth: the less a side may add, the more rounds tell whether it does.
                rounds = 30 if target > 1.2 else 50 if target > 1.1 else 70
                seconds = time_in_turns(sides, rounds + 40 if small else rounds, device)
                note = "; ".join(f"{side} {statistics.median(each) * 1e3:.0f} ms" for side, each in seconds.items())
                figures = ratio(seconds["ours"], seconds["deterministic"])
                yield Row(f"SVI step, {what}; {where}", "deterministic step", limit, *figures, note)
                if what == DWP:
                    figures = ratio(seconds["ours"], seconds["stock"])
                    yield Row(f"SVI step, {what}; {where}", "stock step, float32", 1.0, *figures, note)
            if has_bfloat16(device):
                sides = {
                    "stock": stock,
                    "ours": scene.bayesian("dwp", "shared", "bf16"),
                    "deterministic in bf16": scene.deterministic("bf16"),
                }
                seconds = time_in_turns(sides, 50 if small else 25, device)
                note = "; ".join(f"{side} {statistics.median(each) * 1e3:.0f} ms" for side, each in seconds.items())
                what = f"{DWP}, bf16"
                figures = ratio(seconds["ours"], seconds["stock"])
                yield Row(f"SVI step, {what}; {where}", "stock step, float32", 1.0, *figures, note)


if __name__ == "__main__":
    arguments = chosen(batch=1)
    report(rows(arguments.device, arguments.batch))
