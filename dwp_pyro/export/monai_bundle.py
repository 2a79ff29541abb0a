"""Export of a trained run as a MONAI bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.data.layouts import LAYOUTS
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.prediction.predict import load_run
from dwp_pyro.runtime.files import new_folder, read_yaml, write_bytes, write_json

__all__ = ["export_monai_bundle"]

_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

_NOT_STATED = "not stated"


def export_monai_bundle(run: Path, out: Path) -> None:
    """Write a MONAI bundle that predicts a folder of scans by `predict`.

    The bundle holds `configs/metadata.json` (MONAI's schema of 2024-07-25), `configs/inference.json`,
    `models/posterior.safetensors` and `docs/README.md`, and no pickle. Running it needs this package.

    Raises:
        RunError: if the run cannot be used, or `out` exists; nothing is written then.
    """
    network_config = load_run(run).posterior.network_config
    settings = read_yaml(run / "config.yaml")
    weights = (run / "posterior.safetensors").read_bytes()
    with new_folder(out) as folder:
        write_json(folder / "configs" / "metadata.json", _metadata(network_config))
        write_json(folder / "configs" / "inference.json", _inference())
        write_bytes(folder / "models" / "posterior.safetensors", weights)
        write_bytes(folder / "docs" / "README.md", _readme(network_config, settings).encode())


def _regions(network_config: NetworkConfig) -> str:
    return ", ".join(f"'{region}'" for region in network_config.regions)


def _metadata(network_config: NetworkConfig) -> dict[str, Any]:
    packages = {name: version(name).partition("+")[0] for name in ("monai", "torch", "numpy", "nibabel", "dwp-pyro")}
    window = {"type": "image", "spatial_shape": list(network_config.patch), "dtype": "float32", "is_patch_data": True}
    whole = {
        "type": "image",
        "num_channels": len(network_config.regions),
        "spatial_shape": ["*", "*", "*"],
        "dtype": "float32",
    }
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by dwp-pyro {packages['dwp-pyro']}"},
        "monai_version": packages["monai"],
        "pytorch_version": packages["torch"],
        "numpy_version": packages["numpy"],
        "required_packages_version": {name: packages[name] for name in ("dwp-pyro", "nibabel")},
        "task": f"Segmentation of {_regions(network_config)} in MRI, with uncertainty maps",
        "description": f"A 3D network ({network_config.network}) with a posterior over its convolution kernels. "
        "Posterior samples give the mean probability, its entropy, and the mutual information.",
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
                    "num_channels": len(network_config.modalities),
                    "value_range": [],
                    "channel_def": {str(number): name for number, name in enumerate(network_config.modalities)},
                }
            },
            "outputs": {
                "pred": {
                    **window,
                    "format": "labels",
                    "num_channels": 1 + len(network_config.regions),
                    "value_range": [],
                    "channel_def": {
                        str(number): name for number, name in enumerate(("background", *network_config.regions))
                    },
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


def _readme(network_config: NetworkConfig, settings: Mapping[str, Any]) -> str:
    needs = ("at least one of " if network_config.may_lack_modalities else "") + ", ".join(network_config.modalities)
    spacing = "as scanned" if network_config.spacing is None else f"resampled to {network_config.spacing:g} mm"
    learned = ", ".join(
        f"{name} {settings[name]}"
        for name in ("prior", "center", "init", "likelihood", "evidence", "n")
        if name in settings
    )
    return f"""# Segmentation of {_regions(network_config)}

A 3D network ({network_config.network}) with a posterior over its convolution kernels, trained by
dwp-pyro {version("dwp-pyro")} on scans of the layout {network_config.layout} ({learned}).

    pip install dwp-pyro fire
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir MAPS

SCANS is a folder in a layout of dwp-pyro ({", ".join(sorted(LAYOUTS))}). Each case needs {needs},
skull-stripped if the training scans were; voxels are {spacing}.
MAPS receives per case, on the grid of its scan, `_seg`, `_prob`, `_entropy` and `_mi` (mutual information; both in
nats) as NIfTI, and a picture; one each per region if there are several, e.g. `_prob_core`. Further settings:
`--samples`, `--overlap`, `--seed`, `--precision`, `--decision`.

`network_def` in the configuration maps image windows to logits: the network, or the first of a mixture, at its
posterior means.

Not a medical device. License of the weights: {_NOT_STATED}; the license of the training scans may apply to them.
"""
