"""Settings of predictions."""

from __future__ import annotations

from dataclasses import dataclass

from dwp_pyro.config.base import MAX_SEED, PRECISION_HELP, Settings, setting
from dwp_pyro.runtime.errors import ConfigError

__all__ = ["PredictConfig"]


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Settings):
    """Settings of `predict` and of the predictions in `evaluate`.

    Examples:
        >>> from dwp_pyro import PredictConfig
        >>> PredictConfig(samples=10).to_mapping()["samples"]
        10
    """

    samples: int = setting(
        20,
        "Weight samples S, one pass each, rounded up to the same number per member and mirroring; one such round for "
        "deterministic networks.  0 uses the posterior means of each member: fewer passes, and for a mixture nearly "
        "the same maps.",
        minimum=0,
    )
    overlap: float = setting(0.25, "Overlap of adjacent windows, as a fraction of a window.", minimum=0)
    seed: int = setting(0, "Seed of the weight samples.", minimum=0, maximum=MAX_SEED)
    precision: str = setting("float32", PRECISION_HELP, choices=("float32", "bf16"))
    decision: str = setting(
        "learned",
        "How masks follow from probabilities: as learned from the validation cases of the run, the same with the "
        "largest component alone (largest), or probability above one half without mirrored passes (half).",
        choices=("learned", "largest", "half"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap >= 1:
            raise ConfigError(f"overlap: must be below 1, got {self.overlap:g}")
