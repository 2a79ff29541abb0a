"""Medical Segmentation Decathlon: `imagesTr/BRATS_001.nii.gz`, `labelsTr/BRATS_001.nii.gz`, `imagesTs`.

A file has all modalities, along its fourth axis, in the order of `modality` in dataset.json, whose `labels` names the
values. Without dataset.json the modalities are 0, 1, … and the names of the values are unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel

from dwp_pyro.data.case import UNREADABLE, Case
from dwp_pyro.data.dataset import Layout, LayoutMatch
from dwp_pyro.data.layouts.file_names import has_channel_numbers, match_cases, nifti_files, without_suffix
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.runtime.errors import DataError
from dwp_pyro.runtime.files import read_json

__all__ = ["LAYOUT"]


def _find(root: Path) -> LayoutMatch | None:
    images = {"Tr": nifti_files(root / "imagesTr"), "Ts": nifti_files(root / "imagesTs")}
    files = [*images["Tr"].values(), *images["Ts"].values()]
    if not files or has_channel_numbers(root):  # nnU-Net
        return None
    path = root / "dataset.json"
    description = read_json(path, DataError) if path.exists() else {}
    if "channel_names" in description:
        return None
    modalities, labels = description.get("modality"), description.get("labels")
    if modalities is None:
        modalities = {channel: str(channel) for channel in range(_channels(files[0]))}
    try:
        names = [modality_name(modalities[key]) for key in sorted(modalities, key=int)]
        values = {int(value): str(name) for value, name in (labels or {}).items() if int(value)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        raise DataError(f"{path}: 'modality' and 'labels' should be like {{\"0\": \"FLAIR\"}}; fix them") from problem
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: 'modality' should name each modality once, found {', '.join(names) or 'none'}")
    channels = {name: channel for channel, name in enumerate(names)} if len(names) > 1 else {}
    cases = []
    for subset, files_by_stem in images.items():
        masks = nifti_files(root / f"labels{subset}")
        for stem, file in files_by_stem.items():
            name = without_suffix(file)
            cases.append(Case(name, dict.fromkeys(names, file), masks.get(stem), channels=channels))
    return match_cases(cases, values or None)


def _channels(path: Path) -> int:
    """Return the number of channels in an image header; 1 if unreadable, which `read_case` reports."""
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
