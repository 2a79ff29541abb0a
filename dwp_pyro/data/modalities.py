"""Common names of modalities."""

from __future__ import annotations

import re

__all__ = ["MODALITIES", "modality_name"]

#: Modality → names in data sets.
MODALITIES = {
    "flair": ("t2f", "t2flair", "3dflair"),
    "t1": ("t1w", "t1n", "3dt1", "mprage"),
    "t1ce": ("t1c", "t1gd", "t1wks", "3dt1gado", "gado"),
    "t2": ("t2w",),
    "pd": ("dp", "pdw"),
}
_NAMES = {alias: name for name, aliases in MODALITIES.items() for alias in aliases}


def modality_name(name: str) -> str:
    """Return the common name of a modality: "t1" for "T1w", "t1n" and "MPRAGE"; other names in lower case."""
    plain = re.sub(r"[\W_]+", "", name.casefold().replace("*", "star"))
    return _NAMES.get(plain, plain)
