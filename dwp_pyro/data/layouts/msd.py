"""Medical Segmentation Decathlon: `imagesTr/BRATS_001.nii.gz`, `labelsTr/BRATS_001.nii.gz`, `imagesTs`.

A file holds all modalities, along its fourth axis, in the order of `modality` in dataset.json; `labels` there names
the values. Without dataset.json modalities are called 0, 1, … and the values are not known.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nibabel

from dwp_pyro.data.case import UNREADABLE, Case
from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import found, modality_name, nifti_files
from dwp_pyro.errors import DataError
from dwp_pyro.storage import read_json

__all__ = ["LAYOUT"]


def _find(root: Path) -> Found | None:
    images = {"Tr": nifti_files(root / "imagesTr"), "Ts": nifti_files(root / "imagesTs")}
    files = [*images["Tr"].values(), *images["Ts"].values()]
    if not files or any(re.search(r"_0000$", stem) for part in images.values() for stem in part):  # nnU-Net
        return None
    path = root / "dataset.json"
    about = read_json(path, DataError) if path.exists() else {}
    if "channel_names" in about:
        return None
    modalities, labels = about.get("modality"), about.get("labels")
    if modalities is None:
        modalities = {place: str(place) for place in range(_channels(files[0]))}
    try:
        names = [modality_name(modalities[key]) for key in sorted(modalities, key=int)]
        values = {int(value): str(name) for value, name in (labels or {}).items() if int(value)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        raise DataError(f"{path}: 'modality' and 'labels' should be like {{\"0\": \"FLAIR\"}}; mend them") from problem
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: 'modality' should name each modality once, found {', '.join(names) or 'none'}")
    channels = {name: place for place, name in enumerate(names)} if len(names) > 1 else {}
    cases = []
    for part in images:
        masks = nifti_files(root / f"labels{part}")
        for stem, file in images[part].items():
            name = file.name.removesuffix(".gz").removesuffix(".nii")
            cases.append(Case(name, dict.fromkeys(names, file), masks.get(stem), channels=channels))
    return found(cases, values or None)


def _channels(path: Path) -> int:
    """Of an image by its header; 1 if it cannot be read, which reading the case will say."""
    try:
        image: Any = nibabel.load(path)
    except UNREADABLE:
        return 1
    return int(image.shape[3]) if len(image.shape) == 4 else 1


LAYOUT = Layout(
    name="msd",
    find=_find,
    expected="imagesTr/BRATS_001.nii.gz with all modalities in one file, labelsTr/BRATS_001.nii.gz, dataset.json",
)
