"""How often a 95 % bootstrap interval of a mean holds the truth, by simulation."""

import numpy as np
import pytest

from dwp_pyro.metrics import bootstrap

_TABLES = 2000


@pytest.mark.parametrize(("units", "coverage"), [(5, 0.84), (10, 0.90), (44, 0.94)])
def test_intervals_of_few_normal_units_are_too_narrow_as_the_documents_say(units, coverage, monkeypatch):
    monkeypatch.setattr(bootstrap, "_DRAWS", 1000)
    rng = np.random.default_rng(0)
    found = [bootstrap.bootstrap_interval(rng.normal(size=(1, units))) for _ in range(_TABLES)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert covered == pytest.approx(coverage, abs=3 * np.sqrt(coverage * (1 - coverage) / _TABLES))
