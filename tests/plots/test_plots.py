"""Plots of an evaluation, including few cases and empty bins."""

import numpy as np

from dwp_pyro.metrics.calibration import Reliability
from dwp_pyro.metrics.uncertainty import risk_coverage
from dwp_pyro.plots.curves import save_reliability, save_risk_coverage


def test_curves_of_an_evaluation(tmp_path):
    save_reliability(tmp_path / "r.png", Reliability.of(np.array([0.1, 0.9], np.float32), np.array([False, True])))
    voxels = risk_coverage(np.arange(200), np.arange(200) > 150, 100)
    cases = risk_coverage(np.array([0.3]), np.array([0.2]), 1)
    save_risk_coverage(tmp_path / "c.png", {"Voxels": (voxels, "voxels"), "Cases": (cases, "cases")})
    for name in ("r.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
