"""Training schedule: rates, annealing and seeds as functions of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["TrainingSchedule", "step_seed"]

_WARM_UP = 50  # steps
#: Learning rates of a guide's means (in units of the prior) and of log-scales, as multiples of the rate of network
#: weights, which are of the order of 0.1. Adam moves a parameter by about its rate per step whatever the gradient: at
#: one rate for all, standard deviations would stay near their start.
_SHIFT_RATE, _SCALE_RATE = 12.5, 50.0


@dataclass(frozen=True)
class TrainingSchedule:
    """How to optimize. All rates are functions of the step alone, so that a resumed run equals an uninterrupted one.

    Args:
        steps: Optimization steps.
        learning_rate: Step → learning rate of AdamW; 12.5 times as high for a guide's means, 50 times for log-scales.
        seed: Seed of the weight samples; step t draws from a generator seeded by (seed, t).
        beta: Step → weight of the KL term, above 0.
        weight_decay: Weight decay of AdamW, on the network's deterministic parameters.
        estimator: "weight-sample" or "local".
        validate_every: Steps between two calls of `validate`.
    """

    steps: int
    learning_rate: Callable[[int], float]
    seed: int
    beta: Callable[[int], float] = lambda step: 1.0
    weight_decay: float = 0.0
    estimator: str = "weight-sample"
    validate_every: int = 100

    def warmed_up_rate(self, step: int) -> float:
        """Return the learning rate of a step, which rises from 0 over the first 50 steps or the first tenth of them.

        At full rate from the start one network in ten learned nothing: its output saturated at the background.
        """
        return self.learning_rate(step) * min(1.0, (step + 1) / min(_WARM_UP, self.steps / 10))

    def set(self, step: int, beta: Tensor, rates: Sequence[Tensor]) -> None:
        """Set β and the learning rates of network weights, guide means, and log-scales to those of a step."""
        beta.fill_(self.beta(step))
        for rate, factor in zip(rates, (1.0, _SHIFT_RATE, _SCALE_RATE), strict=True):
            rate.fill_(factor * self.warmed_up_rate(step))


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step, distinct from those of other steps and of neighboring seeds."""
    return (seed * 1_000_003 + step + 1) % 2**63
