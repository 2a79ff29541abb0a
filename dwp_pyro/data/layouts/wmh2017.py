"""WMH 2017: `<site>[/<scanner>]/<id>/pre/{FLAIR,T1}.nii.gz` (`orig` where that is missing) and `<id>/wmh.nii.gz`.

Label 1 is a white matter hyperintensity, a lesion here; 2 is other pathology, which the challenge does not score.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import case_of_stems, found, nifti_files, subfolders

__all__ = ["LAYOUT"]

_IMAGES = {"flair": ("flair",), "t1": ("t1",)}
_DEPTH = 4  # of a case below the root: training/Amsterdam/GE3T/100


def _find(root: Path) -> Found | None:
    return found((_case(folder, root) for folder in _folders(root, _DEPTH, {root.resolve()})), {1: "WMH", 2: "ignore"})


def _folders(folder: Path, depth: int, seen: set[Path]) -> Iterator[Path]:
    """Folders with `pre` or `orig` in them; nothing is looked for below them, nor twice in one place."""
    inside = subfolders(folder)
    if {path.name.casefold() for path in inside} & {"pre", "orig"}:
        yield folder
    elif depth:
        for path in sorted(inside, key=Path.is_symlink):  # links last
            place = path.resolve()
            if place not in seen:
                seen.add(place)
                yield from _folders(path, depth - 1, seen)


def _case(folder: Path, root: Path) -> Case | None:
    name = "_".join(folder.relative_to(root).parts) or folder.name
    label = nifti_files(folder)
    for images in subfolders(folder, "pre") + subfolders(folder, "orig"):
        case = case_of_stems(name, nifti_files(images) | label, _IMAGES, ("wmh",))
        if case is not None:
            return case
    return None


LAYOUT = Layout(
    name="wmh2017",
    find=_find,
    expected="Utrecht/0/pre/FLAIR.nii.gz, with T1, and Utrecht/0/wmh.nii.gz",
)
