"""Files of a prediction: names, maps, and metrics per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from numpy.typing import NDArray

from dwp_pyro.data.case import read_volume
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.runtime.errors import PredictionOutdated
from dwp_pyro.runtime.files import atomic_path, read_json

__all__ = ["MAPS", "VERSION", "PredictionRecord", "map_path", "read_maps", "read_prediction", "save_like"]

#: Version of maps, masks and metrics; files of another version are made again.
VERSION = 3

#: Kinds of maps: probability, predictive entropy, mutual information.
MAPS = ("prob", "entropy", "mi")

_GEOMETRY = (
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


class PredictionRecord(NamedTuple):
    """Content of `<case>.json`.

    Args:
        posterior: Digest of the posterior's file.
        decision: How the masks follow from the probabilities.
        regions: Region → "volume_ml", "pairwise_dice" (None for a single pass), ….
    """

    posterior: str
    decision: Decision
    regions: dict[str, dict[str, Any]]


def read_prediction(out: Path, case: str, regions: Sequence[str]) -> PredictionRecord:
    """Read `<case>.json` of a prediction; `regions` are those whose metrics must be there.

    Raises:
        RunError: if the file is damaged or incomplete.
    """
    path = out / f"{case}.json"
    content = read_json(path)
    try:
        settings, metrics = content["settings"], content["regions"]
        record = PredictionRecord(settings["posterior"], Decision(**settings["decision"]), dict(metrics))
        for region in regions:
            volume, agreement = (metrics[region][name] for name in ("volume_ml", "pairwise_dice"))
            if not (isinstance(volume, float) and isinstance(agreement, float | None)):
                raise TypeError(region)
    except (LookupError, TypeError, ValueError) as problem:
        raise PredictionOutdated(f"{path}: is not the complete record of a prediction") from problem
    return record


def map_path(folder: Path, case: str, kind: str, region: str, network_config: NetworkConfig) -> Path:
    """Return the path of a map of a case, `kind` one of `MAPS`; its name has the region if there are several."""
    return folder / (f"{case}_{kind}.nii.gz" if len(network_config.regions) == 1 else f"{case}_{kind}_{region}.nii.gz")


def read_maps(folder: Path, case: str, kind: str, network_config: NetworkConfig) -> NDArray[np.float32]:
    """Read the maps of a case, one per region [R, X, Y, Z]; arguments as for `map_path`.

    Raises:
        DataError: if a map is missing or damaged.
        PredictionOutdated: if the shapes of the maps differ.
    """
    paths = [map_path(folder, case, kind, region, network_config) for region in network_config.regions]
    maps = [read_volume(path).data for path in paths]
    for path, volume in zip(paths, maps, strict=True):
        if volume.shape != maps[0].shape:
            raise PredictionOutdated(f"{path}: has another shape than {paths[0].name}")
    return np.stack(maps)


def save_like(reference: Path, volume: NDArray[np.uint8] | NDArray[np.float32], path: Path) -> None:
    """Write a volume with the affine, the form codes and the units of a reference scan.

    The rest of its header does not describe the volume, and descriptions and extensions may name the patient.
    """
    source: Any = nibabel.load(reference).header
    header: Any = nibabel.Nifti1Header()
    for name in _GEOMETRY:
        header[name] = source[name]
    header["pixdim"][:4] = source["pixdim"][:4]
    header.set_data_dtype(volume.dtype)
    image = nibabel.Nifti1Image(volume, None, header)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
