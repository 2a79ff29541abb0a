"""BraTS 2018 and 2019: `{HGG,LGG}/<case>/<case>_{flair,t1,t1ce,t2,seg}.nii[.gz]`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case, Layout
from dwp_pyro.data.layouts.files import find_file

__all__ = ["LAYOUT", "find_cases"]

_MODALITIES = ("flair", "t1", "t1ce", "t2")


def find_cases(root: Path) -> list[Case]:
    """Cases under `root/HGG` and `root/LGG`, or directly under `root`."""
    cases = []
    folders = [path for part in (root, root / "HGG", root / "LGG") for path in part.glob("[Bb]ra[Tt][Ss]1[89]_*")]
    for folder in sorted((path for path in folders if path.is_dir()), key=lambda path: path.name):
        found = {modality: find_file(folder, f"{folder.name}_{modality}") for modality in _MODALITIES}
        images = {modality: path for modality, path in found.items() if path is not None}
        if images:
            cases.append(Case(folder.name, images, find_file(folder, f"{folder.name}_seg")))
    return cases


LAYOUT = Layout(
    name="brats",
    find_cases=find_cases,
    labels={1: "necrosis", 2: "oedema", 4: "enhancing"},
    regions={
        "whole": frozenset({1, 2, 4}),
        "core": frozenset({1, 4}),
        "enhancing": frozenset({4}),
    },
    expected="HGG/Brats18_X_1/Brats18_X_1_flair.nii.gz, with t1, t1ce, t2, seg (BraTS 2018 or 2019)",
)
