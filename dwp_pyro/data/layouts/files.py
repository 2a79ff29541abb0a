"""What the layouts share: finding a NIfTI file by its stem."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.errors import DataError

__all__ = ["find_file"]


def find_file(folder: Path, *stems: str) -> Path | None:
    """The file `<stem>.nii.gz` or `<stem>.nii` of a folder, for the first stem that has one.

    Raises:
        DataError: if both exist: which of the two is meant cannot be known.
    """
    for stem in stems:
        found = [path for suffix in (".nii.gz", ".nii") if (path := folder / (stem + suffix)).exists()]
        if len(found) > 1:
            raise DataError(f"{found[1]}: stands beside {found[0].name}; remove one of the two")
        if found:
            return found[0]
    return None
