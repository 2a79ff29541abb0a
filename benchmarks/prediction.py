"""Posterior predictive of a scan against the same number of passes of a deterministic network.

On a CPU a scan of 8 windows replaces one of 75 (240×240×155, the shape of BraTS) with as many voxels per window. A pass
over the large scan takes 9 s, and on a shared machine the ratio over twelve rounds has a standard deviation of .04. The
time of both sides is proportional to the number of windows; the cost of drawing a weight sample, once per pass, counts
nine times as much as in the large scan.

$ python -m benchmarks.prediction [--device cuda]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.comparison import Row, chosen, ratio, report, time_in_turns
from benchmarks.steps import SMALL
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.inference.predictive import posterior_mean_probability, posterior_predictive
from dwp_pyro.priors.blocks import kernel_sites

_SHAPE = (240, 240, 155)  # of BraTS
_TIMED = {"cpu": (96, 96, 104), "cuda": _SHAPE}
_WINDOWS = {_SHAPE: 75, (96, 96, 104): 8}
_MODALITIES = ("flair", "t1", "t1ce", "t2")
_CPU = torch.device("cpu")


class Volume:
    """Random scan, and a small network with a posterior."""

    def __init__(self, shape: tuple[int, int, int] = _SHAPE, device: torch.device = _CPU) -> None:
        torch.manual_seed(0)
        network_config = NetworkConfig(_MODALITIES, ("whole",), ((1, 2, 4),), "brats", None, (64, 64, 64), widths=SMALL)
        network = network_config.build()
        kernels = {site: kernel.detach() for site, kernel in kernel_sites(network).items()}
        self.image = torch.randn(len(_MODALITIES), *shape).to(device)
        self.posterior = Posterior(network_config, [Member(network, MeanFieldNormal(kernels, 0.01))]).to(device)

    def deterministic(self) -> None:
        """Run one sliding-window pass with all weights at their means."""
        posterior_mean_probability(self.posterior, self.image)

    def bayesian(self, samples: int, advance: Callable[[], None] = lambda: None) -> None:
        posterior_predictive(self.posterior, self.image, range(samples), advance=advance)


def rows(device: torch.device) -> Iterator[Row]:
    volume = Volume(_TIMED[device.type], device)
    times = _WINDOWS[_SHAPE] / _WINDOWS[_TIMED[device.type]]
    for samples, rounds in ((1, 40), (3, 12)):

        def passes(samples: int = samples) -> None:
            for _ in range(samples):
                volume.deterministic()

        sides = {"passes": passes, "ours": lambda samples=samples: volume.bayesian(samples)}
        seconds = time_in_turns(sides, rounds, device)
        ours, plain = (times * statistics.median(seconds[side]) for side in ("ours", "passes"))
        note = f"{'extrapolated: ' if times > 1 else ''}{ours:.2f} s; passes {plain:.2f} s"
        what = f"prediction of 240×240×155, four modalities, S = {samples}"
        yield Row(what, f"{samples} × a pass", 1.05, *ratio(seconds["ours"], seconds["passes"]), note)


if __name__ == "__main__":
    report(rows(chosen().device))
