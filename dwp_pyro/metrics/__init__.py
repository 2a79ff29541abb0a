"""Measures of predicted cases: overlap, surfaces, lesions, calibration, uncertainty; all of one region of one case."""

from __future__ import annotations

from dwp_pyro.metrics.case import EMPTY_MASK_POLICY, HEADLINE, MEASURES, CaseMetrics, case_metrics
from dwp_pyro.metrics.summary import Summary, show, summarise

__all__ = [
    "EMPTY_MASK_POLICY",
    "HEADLINE",
    "MEASURES",
    "CaseMetrics",
    "Summary",
    "case_metrics",
    "show",
    "summarise",
]
