"""Splits: disjoint roles, seed, training sets nested in n."""

import json

import pytest

from dwp_pyro.data.split import read_split, seeded_split
from dwp_pyro.runtime.errors import DataError

IDS = [f"case{i:02d}" for i in range(24)]
ALONE = {name: name for name in IDS}
VISITS = {f"{patient}_{visit}": patient for patient in "abcdefghij" for visit in range(1 + "ab".count(patient))}


@pytest.mark.parametrize("seed", range(5))
def test_roles_are_disjoint_and_training_sets_nested(seed):
    small, large = (seeded_split(ALONE, n, 4, seed) for n in (5, 10))
    assert small.train == large.train[:5]
    assert (small.validation, small.test) == (large.validation, large.test)
    assert len(large.test) == 5 and len(large.validation) == 4
    named = large.train + large.validation + large.test
    assert len(set(named)) == len(named)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_cases():
    assert seeded_split(ALONE, 5, 4, 0) == seeded_split({name: name for name in IDS[::-1]}, 5, 4, 0)
    assert seeded_split(ALONE, 5, 4, 0) != seeded_split(ALONE, 5, 4, 1)


def test_all_cases_are_used_without_n():
    split = seeded_split(ALONE, None, 4, 0)
    assert sorted(split.train + split.validation + split.test) == IDS


@pytest.mark.parametrize("seed", range(5))
def test_the_visits_of_a_patient_have_one_role(seed):
    split = seeded_split(VISITS, None, 3, seed)
    roles = [{VISITS[case] for case in role} for role in (split.train, split.validation, split.test)]
    assert [len(role) for role in roles] == [5, 3, 2] and len(set.union(*roles)) == 10
    assert sorted(split.train + split.validation + split.test) == sorted(VISITS)


def test_a_file_that_divides_a_patient_is_refused(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["a_0", "c_0"], "test": ["a_1"]}))
    with pytest.raises(DataError, match="patient 'a' has cases in 'train' and in 'test'"):
        read_split(path, VISITS, None, 0, 0)


def test_a_file_names_the_roles(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": IDS[:14], "test": IDS[14:]}))
    small, large = (read_split(path, ALONE, n, 8, 3) for n in (3, 6))
    assert small.train == large.train[:3]
    assert set(large.train) | set(large.validation) <= set(IDS[:14])
    assert not set(large.train) & set(large.validation)
    assert large.test == tuple(IDS[14:])
    path.write_text(json.dumps({"train": IDS[:5], "validation": [], "test": IDS[14:]}))
    assert set(read_split(path, ALONE, None, 8, 3).train) == set(IDS[:5])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"train": ["case00", "nobody"]}', "'nobody' is not among the scans"),
        ('{"train": ["case00"], "test": ["case00"]}', "'case00' is named twice"),
        ('{"train": "case00"}', "should be a list"),
        ('{"train": ["case00"], "val": ["case01"]}', "'val' is not a role"),
        ("[1]", "JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, says):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_split(path, ALONE, 1, 0, 0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("patients", "n", "validation", "says"),
    [
        (
            24,
            30,
            4,
            "30 training patients requested, 15 available: of 24 patients 5 are for testing and 4 .*; lower n$",
        ),
        (24, 16, 4, "16 training patients requested, 15 available: .* lower n or validation$"),
        # The five patients of isbi2015 with the defaults of svi and fit-prior, and with fewer training patients.
        (5, 5, 4, "5 training patients requested, 0 available: of 5 patients 1 .* and 4 .*; lower n and validation$"),
        (5, None, 4, "1 training patient requested, 0 available: .* lower validation$"),
        (5, 4, 4, "4 training patients requested, 0 available: .* lower validation$"),
    ],
)
def test_too_few_patients_are_reported_with_a_remedy(patients, n, validation, says):
    with pytest.raises(DataError, match=says):
        seeded_split({name: name for name in IDS[:patients]}, n, validation, 0)
