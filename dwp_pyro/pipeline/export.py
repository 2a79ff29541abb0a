"""`export`: a trained run as a MONAI bundle, or its predictions as nnU-Net names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.layouts import LAYOUTS
from dwp_pyro.data.split import read_roles
from dwp_pyro.errors import RunError
from dwp_pyro.inference.posterior import NetworkCard
from dwp_pyro.pipeline.predict import label_volume, load_run, map_path, painting_order, read_maps, save_like
from dwp_pyro.progress import progress
from dwp_pyro.storage import new_folder, read_yaml, write_bytes, write_json

__all__ = ["export_monai_bundle", "export_nnunet", "nnunet_labels"]

_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_NOT_STATED = "not stated"


def export_monai_bundle(run: Path, out: Path) -> Path:
    """Write a MONAI bundle that predicts a folder of scans as `predict` does, because it calls it.

    Holds `configs/metadata.json` (MONAI's schema of 2024-07-25), `configs/inference.json`,
    `models/posterior.safetensors` and `docs/README.md`; no pickle. It needs this package where it is run.

    Args:
        run: folder of a finished `svi` or `finetune` run.
        out: folder of the bundle, to be made.

    Returns:
        The inference configuration.

    Raises:
        RunError: if the run is unfit, or `out` exists; nothing is then written.
    """
    card = load_run(run).posterior.card
    settings = read_yaml(run / "config.yaml")
    weights = (run / "posterior.safetensors").read_bytes()
    with new_folder(out) as folder:
        write_json(folder / "configs" / "metadata.json", _metadata(card))
        write_json(folder / "configs" / "inference.json", _inference())
        write_bytes(folder / "models" / "posterior.safetensors", weights)
        write_bytes(folder / "docs" / "README.md", _readme(card, settings).encode())
    return out / "configs" / "inference.json"


def export_nnunet(run: Path, out: Path) -> list[str]:
    """Write the predictions of a run in the names of nnU-Net's.

    `out` holds labels alone, `<case>.nii.gz`, and the `dataset.json` that says what they mean; probability, entropy
    and mutual information lie in `out/uncertainty`, `<case>_{prob,entropy,mi}.nii.gz`. (nnU-Net's own `.npz` of
    probabilities come with a pickle, and are not written.)

    Args:
        run: folder of a run with predictions.
        out: folder, to be made.

    Returns:
        The cases.

    Raises:
        RunError: if the run has no predictions, or `out` exists; nothing is then written.
    """
    card = load_run(run).posterior.card
    predictions = run / "predictions"
    cases = sorted(path.stem for path in predictions.glob("[!.]*.json"))
    if not cases:
        raise RunError(f"{predictions}: holds no predictions; make them with 'dwp-pyro predict {run} SCANS'")
    values = [painting_order(card).index(number) + 1 for number in range(len(card.regions))]
    train = read_roles(run / "split.json", RunError).get("train", [])
    with new_folder(out) as folder, progress("exporting", len(cases)) as advance:
        for case in cases:
            masks = card.masks(read_maps(predictions, case, "prob", card))
            save_like(predictions / f"{case}_seg.nii.gz", label_volume(masks, card, values), folder / f"{case}.nii.gz")
            for region in card.regions:
                for kind in ("prob", "entropy", "mi"):
                    path = map_path(predictions, case, kind, region, card)
                    write_bytes(folder / "uncertainty" / path.name, path.read_bytes())
            advance(case)
        write_json(
            folder / "dataset.json",
            {
                "channel_names": {str(number): name for number, name in enumerate(card.modalities)},
                **nnunet_labels(card),
                "numTraining": len(train),
                "file_ending": ".nii.gz",
            },
        )
    return cases


def nnunet_labels(card: NetworkCard) -> dict[str, Any]:
    """What `dataset.json` says of labels: region → value, from 1, a region that contains others before them.

    Of regions that may overlap each has the values of all that lie within it, as nnU-Net's region-based training takes
    them.
    """
    order = painting_order(card)
    values = {number: value for value, number in enumerate(order, start=1)}
    if card.activation == "softmax" or len(order) == 1:
        return {"labels": {"background": 0, **{card.regions[number]: value for number, value in values.items()}}}
    labels: dict[str, int | list[int]] = {"background": 0}
    for number in order:
        inside = [other for other in order if set(card.values[other]) <= set(card.values[number])]
        labels[card.regions[number]] = [values[other] for other in inside]
    return {"labels": labels, "regions_class_order": list(values.values())}


def _regions(card: NetworkCard) -> str:
    return ", ".join(f"'{region}'" for region in card.regions)


def _metadata(card: NetworkCard) -> dict[str, Any]:
    packages = {name: version(name).partition("+")[0] for name in ("monai", "torch", "numpy", "nibabel", "dwp-pyro")}
    window = {"type": "image", "spatial_shape": list(card.patch), "dtype": "float32", "is_patch_data": True}
    whole = {"type": "image", "num_channels": len(card.regions), "spatial_shape": ["*", "*", "*"], "dtype": "float32"}
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by dwp-pyro {packages['dwp-pyro']}"},
        "monai_version": packages["monai"],
        "pytorch_version": packages["torch"],
        "numpy_version": packages["numpy"],
        "required_packages_version": {name: packages[name] for name in ("dwp-pyro", "nibabel")},
        "task": f"Segmentation of {_regions(card)} in MRI, with maps of the uncertainty",
        "description": f"A 3D network ({card.network}) with a posterior over its convolution kernels: networks are "
        "drawn from it, and their mean probability, its entropy and their mutual information are written.",
        "authors": _NOT_STATED,
        "copyright": _NOT_STATED,
        "data_type": "nibabel",
        "intended_use": "Research. Not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    **window,
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": len(card.modalities),
                    "value_range": [],
                    "channel_def": {str(number): name for number, name in enumerate(card.modalities)},
                }
            },
            "outputs": {
                "pred": {
                    **window,
                    "format": "labels",
                    "num_channels": 1 + len(card.regions),
                    "value_range": [],
                    "channel_def": {str(number): name for number, name in enumerate(("background", *card.regions))},
                }
            },
            "post_processed_outputs": {
                "prob": {**whole, "format": "probabilities", "value_range": [0, 1]},
                "entropy": {**whole, "format": "magnitude", "value_range": [0, float(np.log(2))]},
                "mi": {**whole, "format": "magnitude", "value_range": [0, float(np.log(2))]},
            },
        },
    }


def _inference() -> dict[str, Any]:
    settings = {field.name: field.default for field in dataclasses.fields(PredictConfig)}
    return {
        "imports": ["$import pathlib", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        **settings,
        "posterior": {
            "_target_": "dwp_pyro.inference.posterior.Posterior.load",
            "path": "$pathlib.Path(@bundle_root) / 'models' / 'posterior.safetensors'",
        },
        "network_def": "$@posterior.members[0].network",
        "predict": {
            "_target_": "dwp_pyro.predict",
            "_mode_": "callable",
            "run": "$pathlib.Path(@bundle_root) / 'models'",
            "scans": ["$pathlib.Path(@dataset_dir)"],
            "config": {"_target_": "dwp_pyro.PredictConfig", **{name: f"@{name}" for name in settings}},
            "out": "$pathlib.Path(@output_dir)",
            "device": "$str(@device)",
            "resume": True,
        },
        "run": ["$@predict()"],
    }


def _readme(card: NetworkCard, settings: Mapping[str, Any]) -> str:
    layouts = sorted(LAYOUTS)
    needs = ("one at least of " if card.may_lack_modalities else "") + ", ".join(card.modalities)
    spacing = "as scanned" if card.spacing is None else f"resampled to {card.spacing:g} mm"
    learned = ", ".join(
        f"{name} {settings[name]}"
        for name in ("prior", "centre", "init", "likelihood", "beta", "n")
        if name in settings
    )
    return f"""# Segmentation of {_regions(card)}

A 3D network ({card.network}) with a posterior over its convolution kernels, trained by
dwp-pyro {version("dwp-pyro")} on scans of the layout {card.layout} ({learned}).

    pip install dwp-pyro fire
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir MAPS

SCANS is a folder in a layout that dwp-pyro knows ({", ".join(layouts)}); each case needs {needs},
skull-stripped if those of the training were; voxels are {spacing}.
MAPS gets for each case, on its own grid, `_seg`, `_prob`, `_entropy` and `_mi`
(mutual information; both in nats) as NIfTI, and a picture; of several regions one each, as `_prob_core`. More settings:
`--samples`, `--overlap`, `--seed`, `--precision`.

`network_def` in the configuration is the network (of a mixture the first) at its posterior means: image windows →
logits.

Not a medical device. Licence of the weights: {_NOT_STATED}; that of the scans they were trained on may bind them.
"""
