"""Names of structures, the regions that they define, and label maps."""

import pytest

from dwp_pyro.data.regions import default_regions, parse_label_map, regions_of, structure
from dwp_pyro.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("structure_", "names"),
    [
        ("oedema", ["edema", "Oedema", "peritumoral edema", "Peritumoural_Oedema", "ED", "SNFH"]),
        ("necrosis", ["NCR", "NCR/NET", "necrotic"]),
        (
            "non-enhancing",
            ["NETC", "NET", "non-enhancing tumor", "Non enhancing tumour", "nonenhancing", "nonenhancing tumor core"],
        ),
        ("enhancing", ["ET", "enhancing tumour", "GD-enhancing tumor", "Enhancing"]),
        ("cystic-component", ["CC", "cystic component"]),
        ("resection-cavity", ["RC", "resection cavity"]),
        ("whole", ["whole tumor", "WT"]),
        ("core", ["Tumor Core", "tc"]),
        ("lesion", ["WMH", "lesion"]),
        ("left-atrium", ["Left_Atrium", "left/atrium"]),
        ("ignore", ["ignore"]),
    ],
)
def test_a_structure_has_one_name(structure_, names):
    assert {structure(name) for name in names} == {structure_}


@pytest.mark.parametrize(
    ("labels", "regions"),
    [
        ({1: "necrosis", 2: "oedema", 4: "enhancing"}, {"whole": {1, 2, 4}, "core": {1, 4}, "enhancing": {4}}),
        ({1: "oedema", 2: "necrosis", 3: "enhancing"}, {"whole": {1, 2, 3}, "core": {2, 3}, "enhancing": {3}}),
        (
            {1: "non-enhancing", 2: "oedema", 3: "enhancing", 4: "resection-cavity"},
            {"whole": {1, 2, 3}, "core": {1, 3}, "enhancing": {3}},
        ),
        (
            {1: "enhancing", 2: "non-enhancing", 3: "cystic-component", 4: "oedema"},
            {"whole": {1, 2, 3, 4}, "core": {1, 2, 3}, "enhancing": {1}},
        ),
        ({1: "oedema", 2: "necrosis"}, {"whole": {1, 2}, "core": {2}}),
        ({1: "oedema", 2: "necrosis", 3: "ignore"}, {"whole": {1, 2}, "core": {2}}),
        ({1: "enhancing"}, {"enhancing": {1}}),
        ({1: "lesion", 2: "ignore"}, {"lesion": {1}}),
        ({1: "liver", 2: "cancer"}, {"liver": {1}, "cancer": {2}, "all": {1, 2}}),
        ({1: "oedema", 2: "enhancing", 3: "ventricle"}, {"oedema", "enhancing", "ventricle", "all"}),
        ({1: "lesion", 2: "lesion", 3: "background"}, {"lesion": {1, 2}}),
        ({}, {}),
    ],
)
def test_regions_follow_from_names(labels, regions):
    found = regions_of(labels)
    assert (found if isinstance(regions, dict) else set(found)) == regions
    assert list(found) == list(regions) or isinstance(regions, set)


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        ({1: "necrosis", 2: "oedema", 4: "enhancing"}, ["whole"]),
        ({1: "anterior", 2: "posterior"}, ["anterior", "posterior"]),
        ({1: "lesion", 2: "ignore"}, ["lesion"]),
        ({}, []),
    ],
)
def test_labels_that_exclude_each_other_are_all_segmented(labels, chosen):
    """Of overlapping regions, the first is segmented."""
    assert default_regions(regions_of(labels)) == chosen


def test_a_label_map():
    assert parse_label_map(["1=edema", " 2 = necrosis", "7=ignore"]) == {1: "oedema", 2: "necrosis", 7: "ignore"}


@pytest.mark.parametrize(
    "entry", ["oedema", "0=oedema", "-1=oedema", "1.5=oedema", "1:oedema", "x=oedema", "40000=a", "1=", "1=+"]
)
def test_invalid_label_maps_are_refused(entry):
    with pytest.raises(ConfigError, match="label"):
        parse_label_map([entry])
    with pytest.raises(ConfigError, match="names 3 twice"):
        parse_label_map(["3=oedema", "3=necrosis"])
