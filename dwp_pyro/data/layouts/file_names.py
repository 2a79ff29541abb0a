"""Helpers of the layouts: folders, files by stem, and names of modalities."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import LayoutMatch
from dwp_pyro.data.modalities import MODALITIES, modality_name
from dwp_pyro.runtime.errors import DataError

__all__ = [
    "case_from_stems",
    "distinct",
    "entries",
    "has_channel_numbers",
    "match_cases",
    "modality_in_name",
    "nifti_files",
    "subfolders",
    "without_suffix",
]

_logger = logging.getLogger(__name__)


def modality_in_name(file: Path) -> str | None:
    """Return the common name of the modality that the name of a file ends in: "t1" for "A_1_t1w.nii"; None without."""
    name = modality_name(re.split(r"[_-]", without_suffix(file))[-1])
    return name if name in MODALITIES else None


def entries(folder: Path) -> list[Path]:
    """Return the sorted entries of a folder without hidden ones; empty, with a warning, if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as problem:
        _warn_once(f"{folder}: cannot be read ({problem.strerror}); its scans are skipped")
        return []


@lru_cache
def _warn_once(message: str) -> None:
    _logger.warning(message)  # each layout looks into the folder


def subfolders(folder: Path, pattern: str = ".+") -> list[Path]:
    """Return the subfolders whose full name matches a pattern, ignoring case."""
    matching = (path for path in entries(folder) if re.fullmatch(pattern, path.name, re.IGNORECASE))
    return [path for path in matching if os.path.isdir(path)]


def distinct(folders: Iterable[Path]) -> list[Path]:
    """Return the folders without duplicates through links."""
    return list({folder.resolve(): folder for folder in reversed(list(folders))}.values())[::-1]


def without_suffix(file: Path) -> str:
    """Return the name of a NIfTI file without `.nii` or `.nii.gz`."""
    return re.sub(r"\.nii(\.gz)?$", "", file.name, flags=re.IGNORECASE)


def nifti_files(folder: Path) -> dict[str, Path]:
    """Return the `.nii` and `.nii.gz` files of a folder by stem in lower case.

    Raises:
        DataError: if two files have the same stem.
    """
    files: dict[str, Path] = {}
    for path in entries(folder):
        name = path.name.casefold()
        stem = name.removesuffix(".gz").removesuffix(".nii")
        if name not in (f"{stem}.nii", f"{stem}.nii.gz") or os.path.isdir(path):
            continue
        if stem in files:
            raise DataError(f"{path}: has the same stem as {files[stem].name}; remove one of the two")
        files[stem] = path
    return files


def has_channel_numbers(root: Path) -> bool:
    """Return whether names in `imagesTr` and `imagesTs` end in the number of a channel, `CASE_0000`, as in nnU-Net.

    In the Decathlon `_0000` would number the case, and its label has the same name.
    """
    images, labels = (
        {**nifti_files(root / f"{kind}Tr"), **nifti_files(root / f"{kind}Ts")} for kind in ("images", "labels")
    )
    return any(stem.endswith("_0000") and stem not in labels for stem in images)


def case_from_stems(
    name: str,
    files: Mapping[str, Path],
    images: Mapping[str, tuple[str, ...]],
    label: tuple[str, ...],
    brain_mask: tuple[str, ...] = (),
    patient: str = "",
) -> Case | None:
    """Return a case from files with known stems; None if it has no image.

    Args:
        name: Id of the case.
        files: Files by stem, from `nifti_files`.
        images: Modality → possible stems of its file, in lower case; the first existing one is used.
        label: Possible stems of the label.
        brain_mask: Possible stems of the brain mask.
        patient: Name of the patient, see `Case`.
    """

    def first(stems: tuple[str, ...]) -> Path | None:
        return next((files[stem] for stem in stems if stem in files), None)

    paths = {modality: path for modality, stems in images.items() if (path := first(stems)) is not None}
    return Case(name, paths, first(label), first(brain_mask), patient=patient) if paths else None


def match_cases(cases: Iterable[Case | None], labels: Mapping[int, str] | None) -> LayoutMatch | None:
    """Return a `LayoutMatch` of the cases that are not None; None without any."""
    existing = [case for case in cases if case is not None]
    return LayoutMatch(existing, labels) if existing else None
