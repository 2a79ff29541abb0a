"""Metrics of one region of one predicted case: overlap, surfaces, lesions, calibration, uncertainty."""

from __future__ import annotations

from dwp_pyro.metrics.measures import EMPTY_MASK_POLICY, HEADLINE, MEASURES, case_metrics
from dwp_pyro.metrics.summary import Summary, show, summarize_cases

__all__ = ["EMPTY_MASK_POLICY", "HEADLINE", "MEASURES", "Summary", "case_metrics", "show", "summarize_cases"]
