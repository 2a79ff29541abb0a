"""nnU-Net v2 raw: `imagesTr/CASE_0000.nii.gz`, a file a channel; `labelsTr/CASE.nii.gz`; `imagesTs`; dataset.json.

There `channel_names` names the channels, `labels` the values or, by lists of values, regions, and `dataset`, if it is
there, the files. Without dataset.json channels are called 0, 1, … and the values are not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import modality_name, nifti_files
from dwp_pyro.data.regions import BACKGROUND, IGNORE, structure
from dwp_pyro.errors import ConfigError, DataError
from dwp_pyro.storage import read_json

__all__ = ["LAYOUT"]


def _find(root: Path) -> Found | None:
    path = root / "dataset.json"
    about = read_json(path, DataError) if path.exists() else {}
    images = {part: nifti_files(root / f"images{part}") for part in ("Tr", "Ts")}
    if "channel_names" not in about and not any(stem.endswith("_0000") for part in images.values() for stem in part):
        return None
    ending = about.get("file_ending", ".nii.gz")
    if ending not in (".nii.gz", ".nii"):
        raise DataError(f"{path}: its file_ending is {ending}, which is no NIfTI; convert the scans to .nii.gz")
    try:
        channels = {int(number): modality_name(name) for number, name in _channel_names(about).items()}
        listed = about.get("dataset") or {}
        cases = [_listed(root, name, files, channels) for name, files in listed.items()]
        if not listed:
            cases = [case for part, files in images.items() for case in _cases(root, part, files, channels)]
        labels, regions = _labels(about.get("labels") or {})
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ConfigError) as problem:
        raise DataError(
            f'{path}: \'channel_names\' should be like {{"0": "T1"}}, \'labels\' like {{"lesion": 1}} or '
            f'{{"whole": [1, 2]}}, \'dataset\' like {{case: {{"images": [...], "label": ...}}}}; mend them'
        ) from problem
    if len(set(channels.values())) < len(channels):
        raise DataError(f"{path}: 'channel_names' names a modality twice ({', '.join(channels.values())}); rename one")
    return Found(cases, labels, regions) if cases else None


def _channel_names(about: Mapping[str, Any]) -> Mapping[Any, str]:
    names: Mapping[Any, str] = about.get("channel_names") or about.get("modality") or {}
    return names


def _cases(root: Path, part: str, files: Mapping[str, Path], channels: Mapping[int, str]) -> list[Case]:
    """The cases of `imagesTr` ("Tr") or `imagesTs` ("Ts"), by their files."""
    images: dict[str, dict[str, Path]] = {}
    for path in files.values():
        split = re.fullmatch(r"(.+)_(\d{4})\.nii(\.gz)?", path.name, re.IGNORECASE)
        if split:
            number = int(split[2])
            images.setdefault(split[1], {})[channels.get(number, str(number))] = path
    masks = nifti_files(root / f"labels{part}")
    return [Case(name, of_case, masks.get(name.casefold())) for name, of_case in images.items()]


def _listed(root: Path, name: str, files: Mapping[str, Any], channels: Mapping[int, str]) -> Case:
    """A case that dataset.json lists, with paths from the root."""
    images = {channels.get(number, str(number)): root / path for number, path in enumerate(files["images"])}
    return Case(name, images, root / files["label"] if files.get("label") else None)


def _labels(
    named: Mapping[str, int | list[int]],
) -> tuple[dict[int, str] | None, dict[str, frozenset[int]] | None]:
    """Value → name, and region → values where lists define regions; None for what is not said."""
    lists = {name: [values] if isinstance(values, int) else values for name, values in named.items()}
    sets = {name: frozenset(map(int, values)) for name, values in lists.items()}
    sets = {name: values - {0} for name, values in sets.items() if values != {0} and structure(name) != BACKGROUND}
    if not sets:
        return None, None
    if not all(sets.values()) or len({structure(name) for name in sets}) < len(sets):
        raise ValueError("a label without values, or two of one meaning")
    ignored = {value for name, values in sets.items() if structure(name) == IGNORE for value in values}
    if all(len(values) == 1 for values in sets.values()):
        return {value: name for name, values in sets.items() for value in values}, None
    regions = {structure(name): values for name, values in sets.items() if structure(name) != IGNORE}
    values = sorted(frozenset().union(*sets.values()))
    return {value: IGNORE if value in ignored else f"label-{value}" for value in values}, regions


LAYOUT = Layout(
    name="nnunet",
    find=_find,
    expected="imagesTr/CASE_0000.nii.gz, a file a channel, labelsTr/CASE.nii.gz, dataset.json (nnU-Net v2 raw)",
)
