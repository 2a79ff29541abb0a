"""nnU-Net v2 raw: `imagesTr/CASE_0000.nii.gz`, one file per channel; `labelsTr/CASE.nii.gz`; `imagesTs`; dataset.json.

In dataset.json, `channel_names` names the channels, `labels` names values or regions (lists of values), and `dataset`
may list the files. Without dataset.json the channels are 0, 1, … and the names of the values are unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Layout, LayoutMatch
from dwp_pyro.data.layouts.file_names import has_channel_numbers, nifti_files
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.data.regions import BACKGROUND, IGNORE, structure
from dwp_pyro.runtime.errors import ConfigError, DataError
from dwp_pyro.runtime.files import read_json

__all__ = ["LAYOUT"]


def _find(root: Path) -> LayoutMatch | None:
    path = root / "dataset.json"
    description = read_json(path, DataError) if path.exists() else {}
    images = {subset: nifti_files(root / f"images{subset}") for subset in ("Tr", "Ts")}
    if "channel_names" not in description and not has_channel_numbers(root):
        return None
    ending = description.get("file_ending", ".nii.gz")
    if ending not in (".nii.gz", ".nii"):
        raise DataError(f"{path}: file_ending is {ending}, expected .nii.gz or .nii; convert the scans to .nii.gz")
    try:
        names = description.get("channel_names") or description.get("modality") or {}
        channels = {int(number): modality_name(name) for number, name in names.items()}
        listed = description.get("dataset") or {}
        cases = [_listed_case(root, name, files, channels) for name, files in listed.items()]
        if not listed:
            cases = [case for subset, files in images.items() for case in _cases(root, subset, files, channels)]
        labels, regions = _labels(description.get("labels") or {})
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ConfigError) as problem:
        raise DataError(
            f'{path}: \'channel_names\' should be like {{"0": "T1"}}, \'labels\' like {{"lesion": 1}} or '
            f'{{"whole": [1, 2]}}, \'dataset\' like {{case: {{"images": [...], "label": ...}}}}; fix them'
        ) from problem
    if len(set(channels.values())) < len(channels):
        raise DataError(f"{path}: 'channel_names' names a modality twice ({', '.join(channels.values())}); rename one")
    return LayoutMatch(cases, labels, regions) if cases else None


def _cases(root: Path, subset: str, files: Mapping[str, Path], channels: Mapping[int, str]) -> list[Case]:
    """Return the cases of `imagesTr` (subset "Tr") or `imagesTs` ("Ts")."""
    images_by_case: dict[str, dict[str, Path]] = {}
    for path in files.values():
        match = re.fullmatch(r"(.+)_(\d{4})\.nii(\.gz)?", path.name, re.IGNORECASE)
        if match:
            number = int(match[2])
            images_by_case.setdefault(match[1], {})[channels.get(number, str(number))] = path
    masks = nifti_files(root / f"labels{subset}")
    return [Case(name, images, masks.get(name.casefold())) for name, images in images_by_case.items()]


def _listed_case(root: Path, name: str, files: Mapping[str, Any], channels: Mapping[int, str]) -> Case:
    """Return a case in `dataset` of dataset.json, whose paths are relative to the root."""
    images = {channels.get(number, str(number)): root / path for number, path in enumerate(files["images"])}
    if "\0" in "".join(map(str, (*files["images"], files.get("label")))):
        raise ValueError("a path that no file can have")
    return Case(name, images, root / files["label"] if files.get("label") else None)


def _labels(labels: Mapping[str, int | list[int]]) -> tuple[dict[int, str] | None, dict[str, frozenset[int]] | None]:
    """Return value → name, and region → values if lists in dataset.json define regions; None if unknown."""
    lists = {name: [values] if isinstance(values, int) else values for name, values in labels.items()}
    sets = {name: frozenset(map(int, values)) for name, values in lists.items()}
    sets = {name: values - {0} for name, values in sets.items() if values != {0} and structure(name) != BACKGROUND}
    if not sets:
        return None, None
    if not all(sets.values()) or len({structure(name) for name in sets}) < len(sets):
        raise ValueError("a label without values, or two labels of the same structure")
    ignored = {value for name, values in sets.items() if structure(name) == IGNORE for value in values}
    if all(len(values) == 1 for values in sets.values()):
        return {value: name for name, values in sets.items() for value in values}, None
    regions = {structure(name): values for name, values in sets.items() if structure(name) != IGNORE}
    values = sorted(frozenset().union(*sets.values()))
    return {value: IGNORE if value in ignored else f"label-{value}" for value in values}, regions


LAYOUT = Layout(
    name="nnunet",
    find=_find,
    expected="imagesTr/CASE_0000.nii.gz, one file per channel, labelsTr/CASE.nii.gz, dataset.json (nnU-Net v2 raw)",
)
