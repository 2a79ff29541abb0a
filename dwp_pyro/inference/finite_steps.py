"""Steps of an optimiser that are left out, because their loss or gradient is no number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dwp_pyro.inference.cuda_graph import Recorded, step_recordably

__all__ = ["MOST_IN_A_ROW", "FiniteSteps"]

#: One bad patch or draw spoils one step, and the next has another. Where ten fail in a row it is the parameters, which
#: no step changes any more, or every patch: going on would only count.
MOST_IN_A_ROW = 10


class FiniteSteps:
    """Steps an optimiser where loss and gradient are finite, and counts the steps that it leaves out.

    A step that is left out changes neither parameters nor moments. A gradient counts as finite if the sum of its
    squares is: Adam adds up squares, and a moment that has become infinite would still its weight for good.

    Args:
        optimizer: of any number of parameters; their gradients are cleared after each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._take: Callable[[], object] = optimizer.step
        self.skipped = 0
        self.in_a_row = 0

    def __call__(self, loss: Tensor) -> None:
        """Take the step, or leave it out, and clear the gradients; the loss is []."""
        squares = _sum_of_squares([p.grad for p in self.parameters if p.grad is not None])
        # One number for all: a GPU is waited for once.
        if bool(squares.isfinite() & loss.isfinite()):
            self._take()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        self.optimizer.zero_grad()

    def record(self) -> None:
        """From now on steps on a GPU are the second one replayed (see `Recorded`).

        Gradients then lie where they lay, and a learning rate that changes is a tensor.
        """
        self._take = Recorded(partial(step_recordably, self.optimizer), self.parameters[0].device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the optimiser."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def stuck(self) -> bool:
        """Whether so many steps were left out in a row that more will be."""
        return self.in_a_row >= MOST_IN_A_ROW

    def counts(self) -> dict[str, int]:
        """Steps left out, in all and in a row: what a checkpoint holds."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def count_on_from(self, counts: Mapping[str, Any]) -> None:
        """Go on from what `counts` gave, or from 0 where it says nothing."""
        self.skipped, self.in_a_row = (int(counts.get(name, 0)) for name in ("skipped", "in_a_row"))


def _sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    if gradients and gradients[0].device.type == "cpu":  # in half the time that norms take
        flat = [gradient.flatten() for gradient in gradients]
        return torch.stack([each.dot(each) for each in flat]).sum()
    return get_total_norm(gradients).square()
