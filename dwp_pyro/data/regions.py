"""Names of label values and the regions that they define."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dwp_pyro.runtime.errors import ConfigError

__all__ = ["BACKGROUND", "IGNORE", "default_regions", "parse_label_map", "regions_of", "structure"]

BACKGROUND = "background"

#: Loss and metrics ignore voxels of this label.
IGNORE = "ignore"

# Structure → synonyms, as normalized by `_words`.
_SYNONYMS = {
    "oedema": ("ed", "snfh", "peritumoural-oedema", "vasogenic-oedema", "peritumoural-oedematous-invaded-tissue"),
    "necrosis": ("necrotic", "ncr", "ncr-net", "necrotic-core", "necrotic-tumour-core", "necrotic-tumour"),
    "non-enhancing": ("net", "netc", "non-enhancing-tumour", "non-enhancing-tumour-core"),
    "enhancing": ("et", "enhancing-tumour", "gd-enhancing-tumour", "contrast-enhancing-tumour"),
    "cystic-component": ("cc", "cystic", "cyst"),
    "resection-cavity": ("rc", "cavity"),
    "whole": ("wt", "whole-tumour"),
    "core": ("tc", "tumour-core"),
    "lesion": ("lesions", "ms-lesion", "wmh", "white-matter-hyperintensity", "white-matter-lesion"),
}
_STRUCTURES = {name: structure for structure, names in _SYNONYMS.items() for name in (structure, *names)}

_TUMOR = {"oedema", "necrosis", "non-enhancing", "enhancing", "cystic-component"}
_NOT_TUMOR = {"resection-cavity"}


def structure(name: str) -> str:
    """Return the common name of a structure: "oedema" for "Peritumoral edema", "ED" and "SNFH".

    Other names become lower case with hyphens ("Left_Atrium" → "left-atrium"), for use in file names.

    Raises:
        ConfigError: if the name has neither a letter nor a digit.
    """
    words = _words(name)
    if not words:
        raise ConfigError(f"label name '{name}': has no letter or digit; choose another name")
    return _STRUCTURES.get(words, words)


def _words(name: str) -> str:
    """Return a name in lower case with hyphens and in one spelling, as in `_SYNONYMS`."""
    words = "-".join(re.findall(r"[^\W_]+", name.casefold())).replace("nonenhancing", "non-enhancing")
    return words.replace("tumor", "tumour").replace("edema", "oedema").replace("ooedema", "oedema")


def regions_of(labels: Mapping[int, str]) -> dict[str, frozenset[int]]:
    """Return the label values of the regions that labels define.

    Two or more structures of a tumor define whole (all of them), core (whole − oedema) and enhancing; a resection
    cavity belongs to none of them. Other structures are one region each, and several also define "all".

    Args:
        labels: Label value → structure; "background" and "ignore" belong to no region.
    """
    structures = {
        name: frozenset(value for value in labels if labels[value] == name)
        for name in labels.values()
        if name not in (BACKGROUND, IGNORE)
    }
    tumor = structures.keys() & _TUMOR
    if len(tumor) > 1 and structures.keys() <= _TUMOR | _NOT_TUMOR:
        whole = _union(structures[name] for name in tumor)
        regions = {"whole": whole, "core": whole - structures.get("oedema", frozenset())}
        return regions | ({"enhancing": structures["enhancing"]} if "enhancing" in structures else {})
    return structures | ({"all": _union(structures.values())} if len(structures) > 1 else {})


def default_regions(regions: Mapping[str, frozenset[int]]) -> list[str]:
    """Return the regions to segment by default.

    These are all regions except "all" if they exclude each other, and otherwise the first one (whole for a tumor).
    """
    names = [name for name in regions if name != "all"]
    sets = [regions[name] for name in names]
    return names if sum(map(len, sets)) == len(_union(sets)) else names[:1]


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)


def parse_label_map(entries: Iterable[str]) -> dict[int, str]:
    """Parse "1=oedema", "2=necrosis" to {1: "oedema", 2: "necrosis"}.

    Raises:
        ConfigError: if an entry is malformed or a value is named twice.
    """
    labels: dict[int, str] = {}
    for entry in entries:
        value, equals, name = entry.partition("=")
        if not equals or not re.fullmatch(r"[1-9][0-9]{0,4}", value.strip()) or int(value) > 32767:
            raise ConfigError(f"label-map: '{entry}' is not of the form 1=oedema, a label value above 0 and its name")
        if int(value) in labels:
            raise ConfigError(f"label-map: names {int(value)} twice")
        labels[int(value)] = structure(name)
    return labels
