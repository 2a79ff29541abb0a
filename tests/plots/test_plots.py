"""Plots of an evaluation, including few cases and empty bins."""

import numpy as np

from dwp_pyro.metrics.calibration import Reliability
from dwp_pyro.metrics.uncertainty import risk_coverage
from dwp_pyro.plots.curves import reliability_figure, risk_coverage_figure
from dwp_pyro.plots.style import save_figure


def test_curves_of_an_evaluation(tmp_path):
    bins = Reliability.of(np.array([0.1, 0.9], np.float32), np.array([False, True]))
    save_figure(tmp_path / "r.png", reliability_figure(bins.confidence, bins.frequency, bins.count))
    voxels = risk_coverage(np.arange(200), np.arange(200) > 150, 100)
    cases = risk_coverage(np.array([0.3]), np.array([0.2]), 1)
    panels = {"Voxels": (*voxels, "voxels"), "Cases": (*cases, "cases")}
    save_figure(tmp_path / "c.png", risk_coverage_figure(panels))
    for name in ("r.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
