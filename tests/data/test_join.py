"""Several data sets as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import DataSet, join_data_sets
from dwp_pyro.runtime.errors import DataError


def data_set(root: str, *cases: Case, labels: dict[int, str], regions: dict[str, set[int]]) -> DataSet:
    return DataSet(Path(root), "manifest", cases, labels, {name: frozenset(values) for name, values in regions.items()})


def lesions(root: str, *cases: Case) -> DataSet:
    return data_set(root, *cases, labels={1: "lesion"}, regions={"lesion": {1}})


def test_cases_and_patients_of_several_sets_stay_apart():
    """Two sets have a case and a patient of the same name."""
    one = lesions("/data/openms", Case("p1", {}), Case("p2", {}))
    other = lesions("/data/scans.csv", Case("p1", {}, patient="A"), Case("p3", {}, patient="A"))
    joined = join_data_sets([one, other])
    assert [case.id for case in joined.cases] == ["openms-p1", "openms-p2", "scans-p1", "scans-p3"]
    assert joined.patients == {
        "openms-p1": "openms-p1", "openms-p2": "openms-p2", "scans-p1": "scans-A", "scans-p3": "scans-A"
    }  # fmt: skip
    assert (joined.root, joined.regions) == (one.root, one.regions)


def test_sets_of_one_name_are_numbered():
    joined = join_data_sets([lesions("/a/ms", Case("p", {})), lesions("/b/ms", Case("p", {}))])
    assert [case.id for case in joined.cases] == ["ms1-p", "ms2-p"]


def test_regions_are_those_of_all_sets():
    one = data_set("/a", labels={1: "lesion", 2: "cyst"}, regions={"lesion": {1}, "cyst": {2}, "all": {1, 2}})
    other = data_set("/b", labels={1: "lesion", 3: "scar"}, regions={"lesion": {1}, "scar": {3}, "all": {1, 3}})
    joined = join_data_sets([one, other])
    assert joined.regions == {"lesion": frozenset({1})}
    assert joined.labels == {1: "lesion", 2: "cyst", 3: "scar"}


def test_ids_that_collide_are_refused():
    """A numbered name is the name of a third set."""
    sets = [lesions(root, Case("p", {})) for root in ("/a/x", "/b/x", "/c/x1")]
    with pytest.raises(DataError, match=r"/a/x: two cases of the data sets would have the id 'x1-p'"):
        join_data_sets(sets)


def test_sets_without_a_common_region_are_refused():
    other = data_set("/b", labels={2: "lesion"}, regions={"lesion": {2}})
    with pytest.raises(DataError, match="/a: shares no region with the other data sets"):
        join_data_sets([lesions("/a"), other])


def test_a_set_without_labels_is_named():
    with pytest.raises(DataError, match=r"/b: no case has a label file"):
        join_data_sets([lesions("/a"), data_set("/b", labels={}, regions={})])


def test_a_label_of_two_meanings_is_refused():
    other = data_set("/b", labels={1: "edema"}, regions={"edema": {1}})
    with pytest.raises(DataError, match=r"/b: label 1 is 'edema', and 'lesion' in another data set; recode one"):
        join_data_sets([lesions("/a"), other])
