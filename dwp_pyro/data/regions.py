"""What label values mean: names of structures, and the regions that they make up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dwp_pyro.errors import ConfigError

__all__ = ["BACKGROUND", "IGNORE", "default_regions", "parse_label_map", "regions_of", "structure"]

BACKGROUND = "background"

#: Voxels of this label are left out of loss and score.
IGNORE = "ignore"

# Structure → what else data sets call it, after `_words`.
_SYNONYMS = {
    "oedema": ("ed", "snfh", "peritumoural-oedema", "vasogenic-oedema", "peritumoural-oedematous-invaded-tissue"),
    "necrosis": ("necrotic", "ncr", "ncr-net", "necrotic-core", "necrotic-tumour-core", "necrotic-tumour"),
    "non-enhancing": (
        "nonenhancing",
        "net",
        "netc",
        "non-enhancing-tumour",
        "nonenhancing-tumour",
        "non-enhancing-tumour-core",
        "nonenhancing-tumour-core",
    ),
    "enhancing": ("et", "enhancing-tumour", "gd-enhancing-tumour", "contrast-enhancing-tumour"),
    "cystic-component": ("cc", "cystic", "cyst"),
    "resection-cavity": ("rc", "cavity"),
    "whole": ("wt", "whole-tumour"),
    "core": ("tc", "tumour-core"),
    "lesion": ("lesions", "ms-lesion", "wmh", "white-matter-hyperintensity", "white-matter-lesion"),
}
_STRUCTURES = {name: structure for structure, names in _SYNONYMS.items() for name in (structure, *names)}

_TUMOUR = {"oedema", "necrosis", "non-enhancing", "enhancing", "cystic-component"}
_NO_TUMOUR = {"resection-cavity"}


def structure(name: str) -> str:
    """The one name of a structure: "Peritumoral edema", "ED" and "SNFH" are all "oedema".

    Others keep their own, in small letters with hyphens ("Left_Atrium" → "left-atrium"), fit for a file's name.

    Raises:
        ConfigError: if the name has no letter and no digit.
    """
    words = _words(name)
    if not words:
        raise ConfigError(f"label name '{name}': has no letter or digit; name what the label marks")
    return _STRUCTURES.get(words, words)


def _words(name: str) -> str:
    """In small letters with hyphens, and in British spelling."""
    hyphened = "-".join(re.findall(r"[^\W_]+", name.casefold()))
    return hyphened.replace("tumor", "tumour").replace("edema", "oedema").replace("ooedema", "oedema")


def regions_of(labels: Mapping[int, str]) -> dict[str, frozenset[int]]:
    """The regions that labels make up, each with its label values.

    Structures of a tumour, two at least: whole, all of them; core, whole − oedema; enhancing. A resection cavity
    may stand beside them and belongs to none. Anything else: each structure by its own name, and of several "all".

    Args:
        labels: label value → structure; "background" and "ignore" belong to no region.
    """
    of = {name: frozenset(value for value in labels if labels[value] == name) for name in labels.values()}
    of = {name: values for name, values in of.items() if name not in (BACKGROUND, IGNORE)}
    tumour = of.keys() & _TUMOUR
    if len(tumour) > 1 and of.keys() <= _TUMOUR | _NO_TUMOUR:
        whole = _union(of[name] for name in tumour)
        regions = {"whole": whole, "core": whole - of.get("oedema", frozenset())}
        return regions | ({"enhancing": of["enhancing"]} if "enhancing" in of else {})
    return of | ({"all": _union(of.values())} if len(of) > 1 else {})


def default_regions(regions: Mapping[str, frozenset[int]]) -> list[str]:
    """What is segmented where nothing else is asked for: all regions if they exclude each other, "all" aside; else,
    as of a tumour, the first, which is the whole.
    """
    names = [name for name in regions if name != "all"]
    sets = [regions[name] for name in names]
    return names if sum(map(len, sets)) == len(_union(sets)) else names[:1]


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)


def parse_label_map(entries: Iterable[str]) -> dict[int, str]:
    """ "1=oedema", "2=necrosis" → {1: "oedema", 2: "necrosis"}.

    Raises:
        ConfigError: if an entry has another form, or a value is named twice.
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
