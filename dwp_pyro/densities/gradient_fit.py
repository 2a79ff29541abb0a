"""Fits of kernel distributions by gradient descent."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from dwp_pyro.densities.kernel_distribution import KernelDistribution
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.non_finite_guard import MAX_IN_A_ROW, NonFiniteGuard

__all__ = ["GradientFitted"]

_BATCH = 512
_LEARNING_RATE = 2e-3
_CHECKS = 40  # evaluations on validation kernels per fit
_CHECK_SAMPLES = 4  # K of a bound in each of them


class GradientFitted(KernelDistribution):
    """A kernel distribution whose parameters are fitted by Adam on a cosine schedule."""

    def loss(self, w: Tensor, fraction: float) -> Tensor:
        """Return the mean negative log-density in nats per kernel, [].

        Args:
            w: Minibatch of kernels, [n, *kernel_shape].
            fraction: Fraction of the schedule that is done, from 0 to 1.
        """
        return -self.log_prob_estimate(w).mean()

    def prepare_first_step(self) -> None:
        """Change the parameters from those of the full-covariance Gaussian, where its gradient is 0."""

    def fit(self, kernels: Tensor, steps: int, *, validation: Tensor | None = None, chosen: int | None = None) -> int:
        """Fit by gradient descent; see `KernelDistribution.fit`.

        Step 0 is the full-covariance Gaussian. With `validation` the parameters of the best step are kept.
        """
        last = steps if chosen is None else chosen
        optimizer = torch.optim.Adam(self.parameters(), lr=_LEARNING_RATE, fused=True)
        take_step = NonFiniteGuard(optimizer)
        best, best_step, best_score = copy.deepcopy(self.state_dict()), 0, -math.inf
        check_every = max(1, last // _CHECKS)
        for step in range(last + 1):
            if validation is not None and (step % check_every == 0 or step == last):
                with torch.no_grad():
                    score = float(self.log_prob_estimate(validation, _CHECK_SAMPLES).mean())
                if score > best_score:
                    best, best_step, best_score = copy.deepcopy(self.state_dict()), step, score
            if step == last:
                break
            if step == 0:
                self.prepare_first_step()
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * _LEARNING_RATE * (1 + math.cos(math.pi * step / steps))
            batch = kernels[torch.randint(len(kernels), (min(_BATCH, len(kernels)),))]
            loss = self.loss(batch, step / steps)
            loss.backward()
            take_step(loss.detach())
            if take_step.diverged:
                raise PriorError(
                    f"kernel prior: the loss of the fit was NaN or infinite in {MAX_IN_A_ROW} steps in a row, for "
                    f"kernels between {float(kernels.min()):.2g} and {float(kernels.max()):.2g}; exclude kernels of "
                    "diverged networks, or fit the family 'gaussian'"
                )
        if validation is None:
            return last
        self.load_state_dict(best)
        return best_step
