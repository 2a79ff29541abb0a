"""The posterior predictive of a whole scan against as many passes of a deterministic network.

$ python -m benchmarks.prediction [--device cuda]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.comparison import Row, chosen, ratio, report, time_in_turns
from benchmarks.steps import SMALL
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.inference.posterior_predictive import posterior_mean_probability, posterior_predictive
from dwp_pyro.models.blocks import kernel_sites

_SHAPE = (240, 240, 155)  # of BraTS
_MODALITIES = ("flair", "t1", "t1ce", "t2")
_CPU = torch.device("cpu")


class Volume:
    """A scan at random, and a small network with a posterior."""

    def __init__(self, shape: tuple[int, int, int] = _SHAPE, device: torch.device = _CPU) -> None:
        keep_freed_memory()
        torch.manual_seed(0)
        card = NetworkCard(_MODALITIES, ("whole",), ((1, 2, 4),), "brats", None, (64, 64, 64), widths=SMALL)
        network = card.build()
        kernels = {site: kernel.detach() for site, kernel in kernel_sites(network).items()}
        self.image = torch.randn(len(_MODALITIES), *shape).to(device)
        self.posterior = Posterior(card, [Member(network, MeanFieldNormal(kernels, 0.01))]).to(device)

    def deterministic(self) -> None:
        """One sliding-window pass, all weights at their means."""
        posterior_mean_probability(self.posterior, self.image)

    def bayesian(self, samples: int, advance: Callable[[], None] = lambda: None) -> None:
        posterior_predictive(self.posterior, self.image, range(samples), advance=advance)


def rows(device: torch.device) -> Iterator[Row]:
    volume = Volume(device=device)
    for samples, rounds in ((1, 12), (3, 4)):
        sides = {"a pass": volume.deterministic, "ours": lambda samples=samples: volume.bayesian(samples)}
        seconds = time_in_turns(sides, rounds, device)
        note = f"{statistics.median(seconds['ours']):.1f} s; a pass {statistics.median(seconds['a pass']):.1f} s"
        figures = ratio(seconds["ours"], [samples * each for each in seconds["a pass"]])
        yield Row(
            f"prediction of 240×240×155, four modalities, S = {samples}", f"{samples} × a pass", 1.05, *figures, note
        )


if __name__ == "__main__":
    report(rows(chosen().device))
