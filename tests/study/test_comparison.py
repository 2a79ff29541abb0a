"""Means over seeds, and the bootstrap of paired differences against known variances."""

from dataclasses import replace

import numpy as np
import pytest

from dwp_pyro.metrics import MEASURES
from dwp_pyro.metrics.bootstrap import bootstrap_means
from dwp_pyro.plots.curves import save_learning_curves
from dwp_pyro.runtime.table import markdown
from dwp_pyro.study.comparison import Row, compare, paired_difference, summarize_methods


def row(method: str, n: int, seed: int, case: str, dice: float) -> Row:
    measures = dict.fromkeys(MEASURES, 0.0) | {"dice": dice, "iou": dice / 2}
    return Row(method, n, seed, case, measures, 10.0 * seed, "x", case)


def grid(method: str, dice, n: int = 5) -> list[Row]:
    """Return a row for each value [seeds, cases]."""
    return [
        row(method, n, seed, f"case{c}", float(d)) for seed, values in enumerate(dice) for c, d in enumerate(values)
    ]


def as_pairs(values) -> dict[tuple[int, str], float]:
    return {(seed, f"case{case}"): float(value) for (seed, case), value in np.ndenumerate(values)}


def design(rng: np.random.Generator, seeds: int, cases: int, spreads: tuple[float, float, float]):
    """Draw μ + aₛ + b_c + e_sc with Gaussian effects."""
    a, b, e = spreads
    return 0.1 + a * rng.normal(size=(seeds, 1)) + b * rng.normal(size=cases) + e * rng.normal(size=(seeds, cases))


def test_means_are_over_cases_first_and_errors_over_seeds():
    table = summarize_methods([*grid("low", [[0.1, 0.3]]), *grid("high", [[0.5, 0.7], [0.8, 0.8], [0.4, 0.4]])])
    assert list(table) == [5] and list(table[5]) == ["high", "low"]
    dice = table[5]["high"]["dice"]
    assert (dice.mean, dice.cases) == (pytest.approx(0.6), 3)
    assert dice.standard_error == pytest.approx(0.2 / np.sqrt(3))
    assert table[5]["high"]["seconds"].mean == pytest.approx(10)


def test_bootstrap_variance_given_a_table():
    """It is the sum of the variances of row means, column means and residuals over S, C and SC."""
    values = design(np.random.default_rng(1), 6, 9, (0.1, 0.2, 0.3))
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = values - rows - columns + values.mean()
    exact = rows.var() / 6 + columns.var() / 9 + rest.var() / (6 * 9)
    draws = 40_000
    means = bootstrap_means(values, draws)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * np.sqrt(exact / draws))
    assert means.var() == pytest.approx(exact, rel=4 * np.sqrt(2 / draws))


def test_bootstrap_variance_of_a_two_way_gaussian_design():
    """Its mean over designs is the variance σₐ²/S + σ_b²/C of the mean, with the bias of plug-in variances."""
    rng = np.random.default_rng(0)
    seeds, cases, designs = 10, 15, 400
    found = [bootstrap_means(design(rng, seeds, cases, (0.2, 0.3, 0.0)), 400, seed=i).var() for i in range(designs)]
    expected = 0.2**2 / seeds * (1 - 1 / seeds) + 0.3**2 / cases * (1 - 1 / cases)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(designs))


def test_cases_that_no_two_seeds_share_are_weighed_as_they_are_drawn():
    values = np.full((2, 4), np.nan)
    values[0, :2], values[1, 2:] = 1.0, 3.0
    means = bootstrap_means(values, 2000)
    assert 1900 < len(means) <= 2000 and np.isfinite(means).all()
    assert means.min() == 1 and means.max() == 3 and means.mean() == pytest.approx(2, abs=0.1)


def test_identical_methods_do_not_differ():
    values = as_pairs(np.random.default_rng(0).normal(size=(3, 4)))
    assert paired_difference(values, values) == (0, 0, 0)


def test_a_difference_is_of_what_both_methods_have():
    reference = as_pairs([[0.5, 0.7], [0.6, 0.8]])
    method = {pair: value - 0.1 for pair, value in as_pairs([[0.5, 0.7]]).items()} | {(7, "case0"): 0.0}
    assert paired_difference(reference, method) == pytest.approx((0.1, 0.1, 0.1))


def test_tables():
    rows = [*grid("A|B", [[0.5], [0.7]]), *grid("C", [[0.4], [0.5], [0.6]]), *grid("C", [[0.9]], n=10)]
    means, differences = compare(rows, None)
    assert [line[:4] for line in means.rows] == [
        ["5", "A|B", "2", "0.600 ± 0.100"],
        ["5", "C", "3", "0.500 ± 0.058"],
        ["10", "C", "1", "0.900"],
    ]
    assert [line[:4] for line in differences.rows] == [["5", "A|B − C", "2", "+0.150 [+0.100, +0.200]"]]
    assert [line[1] for line in compare(rows, "C")[1].rows] == ["C − A|B"]
    # A|B is the best for seeds 0 and 1, C for seed 2; the gap of the best to itself is 0.
    assert [line[-1] for line in means.rows[:2]] == ["+0.000 [+0.000, +0.000]", "+0.100 [+0.000, +0.200]"]
    apart = compare([*grid("A", [[0.5]]), row("B", 5, 0, "another", 0.4)], None)[0]
    assert [line[-1] for line in apart.rows] == ["+0.000 [+0.000, +0.000]", "-"]
    text = markdown([means, differences])
    assert "| 5 | A\\|B | 2 | 0.600 ± 0.100 |" in text
    assert "resample seeds and patients" in text and "these patients only" in text
    assert len(compare(grid("C", [[0.4]]), "A")) == 1


def test_visits_of_a_patient_count_as_one():
    """Four visits of one patient and one of another: the interval is that of two patients."""
    visits = [replace(row("A", 5, 0, f"p1-{visit}", 0.5), patient="p1") for visit in range(4)]
    other = [replace(each, method="B", measures={**each.measures, "dice": 0.4}) for each in visits]
    means, differences = compare([*visits, row("A", 5, 0, "p2", 0.9), *other, row("B", 5, 0, "p2", 0.5)], None)
    assert [line[:4] for line in means.rows] == [["5", "A", "1", "0.700"], ["5", "B", "1", "0.450"]]
    assert differences.rows[0][3] == "+0.250 [+0.100, +0.400]"


def test_the_reference_is_the_best_on_the_seeds_of_all_methods():
    """A has the higher mean, but on seed 1, which both have, B is better."""
    rows = [*grid("A", [[0.9], [0.3]]), row("B", 5, 1, "case0", 0.4)]
    assert [line[:4] for line in compare(rows, None)[1].rows] == [["5", "B − A", "1", "+0.100 [+0.100, +0.100]"]]


def test_a_measure_that_rows_lack_is_a_dash():
    """Rows of an older version lack the metric."""
    old = [replace(each, measures={"dice": 0.5, "nll": 0.1, "ece": 0.01}) for each in grid("old", [[0.5]])]
    means, _ = compare([*grid("new", [[0.4]]), *old], None)
    lines = {line[1]: dict(zip(means.header, line, strict=True)) for line in means.rows}
    assert (lines["old"]["Dice"], lines["old"]["NSD"]) == ("0.500", "-")
    assert (lines["new"]["Dice"], lines["new"]["NSD"]) == ("0.400", "0.000")


def test_learning_curves(tmp_path):
    rows = [*grid("A", [[0.5], [0.7]]), *grid("B", [[0.4]]), *grid("A", [[0.9]], n=20)]
    save_learning_curves(tmp_path / "curve.png", summarize_methods(rows))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
