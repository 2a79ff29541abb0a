"""Bootstrap means and intervals over seeds and cases."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap_interval", "bootstrap_means"]

_DRAWS = 10_000

_BLOCK = 1_000  # draws per block


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_means(values: NDArray[np.float64], draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Return means of a table whose rows and columns are resampled with replacement, independently (Owen 2007).

    Args:
        values: Table [seeds, cases]; NaN where a case is not measured with a seed.
        draws: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        Means over the drawn values, [draws] or fewer: a draw that hits only NaN is skipped.
    """
    rng = np.random.default_rng(seed)
    present = ~np.isnan(values)
    filled, measured = np.where(present, values, 0), present.astype(np.float64)
    # How often each row and each column is drawn, in blocks of draws; small integers keep memory low.
    blocks = [len(block) for block in np.array_split(np.arange(draws), math.ceil(draws / _BLOCK))]
    drawn_rows, drawn_columns = (
        [rng.multinomial(size, np.full(size, 1 / size), block).astype(np.uint16) for block in blocks]
        for size in values.shape
    )
    means = []
    for seeds, cases in zip(drawn_rows, drawn_columns, strict=True):
        counts = ((seeds @ measured) * cases).sum(1)
        drawn = counts > 0
        means.append(((seeds @ filled) * cases).sum(1)[drawn] / counts[drawn])
    return np.concatenate(means)


def bootstrap_interval(values: NDArray[np.float64]) -> Interval:
    """Return the mean of a table [seeds, cases] with gaps as NaN, and the percentiles of its `bootstrap_means`."""
    low, high = np.percentile(bootstrap_means(values, _DRAWS), [2.5, 97.5])
    return Interval(float(np.nanmean(values)), float(low), float(high))
