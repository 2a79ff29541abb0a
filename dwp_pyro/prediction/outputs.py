"""Files of a prediction: names, maps, and metrics per case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from dwp_pyro.data.case import read_volume
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.runtime.errors import PredictionOutdated
from dwp_pyro.runtime.files import atomic_path, read_json

__all__ = ["VERSION", "check_posterior", "map_path", "read_case_metrics", "read_decision", "read_maps", "save_like"]


#: Version of maps, masks and metrics; files of another version are made again.
VERSION = 2

_GEOMETRY = (
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


def read_case_metrics(out: Path, case: str, network_config: NetworkConfig) -> dict[str, dict[str, Any]]:
    """Read `<case>.json` of a prediction: region → "volume_ml", "pairwise_dice" (None for a single pass), ….

    Raises:
        RunError: if the file is damaged or incomplete.
    """
    path = out / f"{case}.json"
    regions = read_json(path).get("regions")
    for region in network_config.regions:
        metrics = regions.get(region) if isinstance(regions, dict) else None
        if not isinstance(metrics, dict) or not (
            isinstance(metrics.get("volume_ml"), float) and isinstance(metrics.get("pairwise_dice"), float | None)
        ):
            raise PredictionOutdated(f"{path}: does not hold the metrics of '{region}'")
    return dict(regions or {})


def map_path(folder: Path, case: str, kind: str, region: str, network_config: NetworkConfig) -> Path:
    """Return the path of a map ("prob", "entropy", "mi") of a case; its name has the region if there are several."""
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


def read_decision(out: Path, case: str) -> Decision:
    """Read how the masks of a prediction follow from its probabilities, from `<case>.json`.

    Raises:
        RunError: if the file is damaged or incomplete.
    """
    path = out / f"{case}.json"
    try:
        return Decision(**read_json(path)["settings"]["decision"])
    except (KeyError, TypeError, ValueError) as problem:
        raise PredictionOutdated(f"{path}: does not say how its masks were made") from problem


def check_posterior(out: Path, case: str, digest: str) -> None:
    """Raise PredictionOutdated unless a prediction is of the posterior whose file has this digest."""
    path = out / f"{case}.json"
    settings = read_json(path).get("settings")
    if not isinstance(settings, dict) or settings.get("posterior") != digest:
        raise PredictionOutdated(f"{path}: is of another posterior than that of the run")


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
