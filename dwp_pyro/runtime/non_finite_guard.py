"""An optimizer that skips steps whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dwp_pyro.runtime.cuda_graph import GraphedCallable, capturable_step

__all__ = ["MAX_IN_A_ROW", "NonFiniteGuard"]

#: One bad patch or draw spoils one step. Ten in a row mean that the parameters themselves, which skipped steps do not
#: change, or all patches are the cause.
MAX_IN_A_ROW = 10


class NonFiniteGuard:
    """Take an optimizer's steps where loss and gradient are finite; skip and count the others.

    A skipped step changes neither parameters nor moments. A gradient counts as finite if the sum of its squares is:
    Adam accumulates squares, and an infinite moment would freeze its weight permanently.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._take: Callable[[], object] = optimizer.step
        self.skipped = 0
        self.in_a_row = 0

    def __call__(self, loss: Tensor) -> None:
        """Take or skip the step, and clear the gradients; the loss is []."""
        squares = get_total_norm([p.grad for p in self.parameters if p.grad is not None]).square()
        # One test of both, so that a GPU synchronizes once.
        if bool(squares.isfinite() & loss.isfinite()):
            self._take()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        self.optimizer.zero_grad()

    def capture(self) -> None:
        """Capture steps on a GPU and replay them (see `GraphedCallable`).

        Gradients must then keep their addresses, and a learning rate that changes must be a tensor.
        """
        self._take = GraphedCallable(partial(capturable_step, self.optimizer), self.parameters[0].device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def diverged(self) -> bool:
        """Whether `MAX_IN_A_ROW` steps in a row were skipped."""
        return self.in_a_row >= MAX_IN_A_ROW

    def state_dict(self) -> dict[str, int]:
        """Return the numbers of skipped steps, in total and in a row, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, counts: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a missing count is 0."""
        self.skipped, self.in_a_row = (int(counts.get(name, 0)) for name in ("skipped", "in_a_row"))
