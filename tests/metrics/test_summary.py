"""Summaries over cases, and their format."""

import math

import pytest

from dwp_pyro.metrics import show, summarize_cases
from dwp_pyro.metrics.summary import patient_means


def test_summary_is_the_mean_and_its_standard_error():
    summary = summarize_cases([{"dice": 0.2}, {"dice": 0.4}, {"dice": 0.9}])["dice"]
    assert summary.mean == pytest.approx(0.5)
    assert summary.standard_error == pytest.approx(math.sqrt(0.13 / 3))
    assert summary.cases == 3
    assert math.isnan(summarize_cases([{"dice": 0.2}])["dice"].standard_error)


def test_a_measure_is_summarised_over_the_cases_that_have_it():
    summaries = summarize_cases([{"dice": 0.2}, {"dice": 0.4, "nsd": 0.5}])
    assert (summaries["nsd"].mean, summaries["nsd"].cases) == (0.5, 1)
    assert summaries["dice"].cases == 2


def test_what_tables_show():
    summaries = summarize_cases([{"dice": 0.2, "hd95": 10.0}, {"dice": 0.4, "hd95": 20.0}])
    assert show("dice", summaries["dice"]) == "0.300 ± 0.100"
    assert show("hd95", summaries["hd95"]) == "15.0 ± 5.0"
    assert show("dice", summarize_cases([{"dice": 0.2}])["dice"]) == "0.200"
    assert show("nsd", summaries.get("nsd")) == "-"


def test_cases_of_a_patient_count_once():
    cases = {"a1": {"dice": 0.2, "hd95": 4.0}, "b": {"dice": 0.6}, "a2": {"dice": 0.4}}
    means = patient_means(cases, {"a1": "a", "a2": "a", "b": "b"})
    assert means == [pytest.approx({"dice": 0.3, "hd95": 4.0}), {"dice": 0.6}]
    assert summarize_cases(means)["dice"].cases == 2
