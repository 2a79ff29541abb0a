"""Export of predictions in the layout of nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwp_pyro.data.case import read_volume
from dwp_pyro.data.split import read_roles
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.prediction.labels import label_values, overlay_order, warn_of_crossing_regions
from dwp_pyro.prediction.outputs import MAPS, map_path, read_prediction, save_like
from dwp_pyro.prediction.predict import load_run
from dwp_pyro.runtime.errors import PredictionOutdated, RunError
from dwp_pyro.runtime.files import new_folder, write_bytes, write_json
from dwp_pyro.runtime.progress import progress

__all__ = ["export_nnunet", "nnunet_labels"]


def export_nnunet(run: Path, out: Path) -> list[str]:
    """Write the predictions of a run with the file names of nnU-Net.

    `out` holds label maps, `<case>.nii.gz`, and their `dataset.json`; probability, entropy and mutual information are
    in `out/uncertainty/<case>_{prob,entropy,mi}.nii.gz`. nnU-Net's `.npz` files contain a pickle and are not written.

    Returns:
        Ids of the cases.

    Raises:
        RunError: if the run has no predictions, or those of another posterior, or `out` exists; nothing is written
            then.
    """
    trained = load_run(run)
    network_config = trained.posterior.network_config
    warn_of_crossing_regions(network_config)
    predictions = run / "predictions"
    cases = sorted(path.stem for path in predictions.glob("[!.]*.json"))
    if not cases:
        raise RunError(f"{predictions}: holds no predictions; make them with 'dwp-pyro predict {run} SCANS'")
    train = read_roles(run / "split.json", RunError).get("train", [])
    with new_folder(out) as folder, progress("exporting", len(cases)) as advance:
        for case in cases:
            if read_prediction(predictions, case, ()).posterior != trained.digest:
                raise PredictionOutdated(f"{predictions / case}.json: is of another posterior than that of the run")
            path = predictions / f"{case}_seg.nii.gz"
            save_like(path, to_nnunet(read_volume(path).data, network_config), folder / f"{case}.nii.gz")
            for region in network_config.regions:
                for kind in MAPS:
                    path = map_path(predictions, case, kind, region, network_config)
                    if not path.exists():
                        raise PredictionOutdated(f"{path}: is missing")
                    write_bytes(folder / "uncertainty" / path.name, path.read_bytes())
            advance(case)
        write_json(
            folder / "dataset.json",
            {
                "channel_names": {str(number): name for number, name in enumerate(network_config.modalities)},
                **nnunet_labels(network_config),
                "numTraining": len(train),
                "file_ending": ".nii.gz",
            },
        )
    return cases


def to_nnunet(segmented: NDArray[Any], network_config: NetworkConfig) -> NDArray[np.uint8]:
    """Return a label map of `predict` with the values of `nnunet_labels`."""
    values, order = label_values(network_config), overlay_order(network_config)
    return np.select([segmented == values[number] for number in order], range(1, 1 + len(order))).astype(np.uint8)


def nnunet_labels(network_config: NetworkConfig) -> dict[str, Any]:
    """Return the labels of `dataset.json`: region → value, counted from 1, outer regions before those they contain.

    Regions that may overlap have the values of all regions inside them, as in nnU-Net's region-based training.
    """
    order = overlay_order(network_config)
    values = {number: value for value, number in enumerate(order, start=1)}
    if network_config.activation == "softmax" or len(order) == 1:
        return {
            "labels": {"background": 0, **{network_config.regions[number]: value for number, value in values.items()}}
        }
    labels: dict[str, int | list[int]] = {"background": 0}
    for number in order:
        inside = [other for other in order if set(network_config.values[other]) <= set(network_config.values[number])]
        labels[network_config.regions[number]] = [values[other] for other in inside]
    return {"labels": labels, "regions_class_order": list(values.values())}
