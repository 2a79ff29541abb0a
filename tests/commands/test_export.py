"""Exports: a MONAI bundle computes the maps of `predict`; an nnU-Net folder has the names of nnU-Net."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import Result

from dwp_pyro.export.nnunet import nnunet_labels, to_nnunet
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.prediction.labels import label_values, to_label_map
from tests.world import SVI_RUN, World, call

MAPS = ("seg", "prob", "entropy", "mi")
CASES = ("Brats18_PHA_001_1", "Brats18_PHA_002_1")


def refused(result: Result, culprit: str) -> bool:
    return result.exit_code == 2 and result.stderr.startswith("Error: ") and culprit in result.stderr


@pytest.fixture(scope="module")
def bundle(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the bundle; tests must not change it."""
    out = tmp_path_factory.mktemp("export") / "bundle"
    result = call("export", world.path / SVI_RUN, out, "--format", "monai-bundle")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def scans(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of two cases."""
    folder = tmp_path_factory.mktemp("scans")
    for case in CASES:
        (folder / case).symlink_to(world.path / "data" / "brats" / "HGG" / case)
    return folder


@pytest.fixture(scope="module")
def expected(world: World, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predict the same cases."""
    out = tmp_path_factory.mktemp("predict")
    assert call("predict", world.path / SVI_RUN, scans, "--samples", 2, "--out", out).exit_code == 0
    return out


def assert_same_maps(maps: Path, expected: Path) -> None:
    names = {path.name for path in expected.glob("*.nii.gz")}
    assert names == {f"{case}_{kind}.nii.gz" for case in CASES for kind in MAPS}
    assert {path.name for path in maps.glob("*.nii.gz")} == names
    for name in names:
        one, other = (nibabel.load(folder / name) for folder in (maps, expected))
        np.testing.assert_array_equal(one.affine, other.affine)
        np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))


@pytest.mark.filterwarnings("ignore:.*no allow list")  # MONAI warns that a configuration runs code
def test_the_bundle_computes_the_maps_of_predict(bundle, scans, expected, tmp_path):
    from monai.bundle import run

    run(
        config_file=str(bundle / "configs" / "inference.json"),
        bundle_root=str(bundle),
        dataset_dir=str(scans),
        output_dir=str(tmp_path),
        device="cpu",
        samples=2,
    )
    assert_same_maps(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fire") is None, reason="MONAI's command line needs the package fire")
def test_monai_runs_the_bundle_from_a_shell(bundle, scans, expected, tmp_path):
    """Run the bundle in its own process and folder."""
    monai = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    settings = ["--dataset_dir", str(scans), "--output_dir", str(tmp_path), "--samples", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OMP_NUM_THREADS": "1"}
    subprocess.run([*monai, *settings, "--device", "cpu"], cwd=bundle, env=environment, check=True, capture_output=True)
    assert_same_maps(tmp_path, expected)


def test_the_bundle_describes_itself(bundle, in_world):
    """The metadata has the fields of MONAI's schema and describes the network; no file is a pickle."""
    from monai.bundle import ConfigParser

    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    text = {"schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors"}
    assert all(isinstance(metadata[name], str) and metadata[name] for name in text | {"copyright"})
    assert set(metadata["required_packages_version"]) == {"dwp-pyro", "nibabel"}
    formats = metadata["network_data_format"]
    for tensor in (
        *formats["inputs"].values(),
        *formats["outputs"].values(),
        *formats["post_processed_outputs"].values(),
    ):
        assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"} <= tensor.keys()

    import torch

    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser["bundle_root"] = str(bundle)
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    network = parser.get_parsed_content("network_def")
    logits = network(torch.zeros(1, image["num_channels"], *image["spatial_shape"]))
    assert list(logits.shape) == [1, pred["num_channels"], *pred["spatial_shape"]]
    assert pred["channel_def"] == {"0": "background", "1": "whole"}

    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "configs/metadata.json",
        "configs/inference.json",
        "models/posterior.safetensors",
        "docs/README.md",
    }
    assert (bundle / "models/posterior.safetensors").read_bytes() == Path(SVI_RUN, "posterior.safetensors").read_bytes()
    readme = (bundle / "docs" / "README.md").read_text()
    assert "'whole'" in readme and "prior dwp" in readme and "evidence 50000.0, n 2" in readme


def test_an_nnunet_folder_has_only_labels_and_its_dataset_file(command, copy_of_world, scans):
    result = command("export", SVI_RUN, "out", "--format", "nnunet")
    assert refused(result, f"dwp-pyro predict {SVI_RUN}") and not Path("out").exists()
    assert command("predict", SVI_RUN, scans, "--samples", 1).exit_code == 0
    result = command("export", SVI_RUN, "out", "--format", "nnunet")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("out").glob("*.*")) == [*(f"{n}.nii.gz" for n in CASES), "dataset.json"]
    dataset = json.loads(Path("out/dataset.json").read_text())
    assert dataset == {
        "channel_names": {"0": "flair"},
        "labels": {"background": 0, "whole": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    for name in CASES:
        label, truth = nibabel.load(f"out/{name}.nii.gz"), nibabel.load(f"{SVI_RUN}/predictions/{name}_seg.nii.gz")
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(label.affine, truth.affine)
        np.testing.assert_array_equal(np.asarray(label.dataobj), np.asarray(truth.dataobj))
    maps = {path.name for path in Path("out/uncertainty").iterdir()}
    assert maps == {f"{name}_{kind}.nii.gz" for name in CASES for kind in ("prob", "entropy", "mi")}
    assert refused(command("export", SVI_RUN, "out", "--format", "nnunet"), "out: exists already")
    mutual_information = Path(SVI_RUN, "predictions", f"{CASES[0]}_mi.nii.gz")
    hidden = mutual_information.rename("hidden")
    assert refused(
        command("export", SVI_RUN, "again", "--format", "nnunet"), f"{mutual_information.name}: is missing; predict"
    )
    hidden.rename(mutual_information)
    marker = Path(SVI_RUN, "predictions", f"{CASES[1]}.json")
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"settings": content["settings"] | {"posterior": "of a run before"}}))
    assert refused(command("export", SVI_RUN, "again", "--format", "nnunet"), f"{marker.name}: is of another posterior")
    assert not Path("again").exists()


def test_overlapping_regions_become_nested_labels():
    """Labels are those of nnU-Net's region-based training, outermost first."""
    network_config = NetworkConfig(
        ("flair",), ("core", "whole", "enhancing"), ((1, 4), (1, 2, 4), (4,)), "brats", None, (16, 16, 16)
    )
    assert nnunet_labels(network_config) == {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
        "regions_class_order": [1, 2, 3],
    }
    masks = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)  # core, whole, enhancing
    label = to_label_map(masks, network_config)
    assert label.tolist() == [0, 2, 1, 4] and to_nnunet(label, network_config).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("regions", "values"),
    [
        ({"a": (1,), "b": (2,), "all": (1, 2)}, (1, 2, 3)),  # "all" has no value of its own
        ({"all": (1, 2), "a": (1,), "b": (2,)}, (3, 1, 2)),
        ({"a": (1, 2), "b": (1, 3)}, (1, 3)),  # overlapping, not nested
        ({"a": (300,), "b": (301,)}, (300, 301)),
    ],
)
def test_regions_have_distinct_values(regions, values):
    network_config = NetworkConfig(("flair",), tuple(regions), tuple(regions.values()), "manifest", None, (16, 16, 16))
    assert label_values(network_config) == values
    assert to_label_map(np.eye(len(regions), dtype=bool), network_config).tolist() == list(values)


@pytest.mark.parametrize(
    ("run", "out", "form", "culprit"),
    [
        ("nowhere", "out", "monai-bundle", "nowhere"),
        ("runs/prior-ms", "out", "nnunet", "runs/prior-ms"),
        (SVI_RUN, "data", "monai-bundle", "data: exists already"),
        (SVI_RUN, f"{SVI_RUN}/config.yaml", "monai-bundle", "config.yaml: exists already"),
    ],
)
def test_invalid_exports(command, in_world, run, out, form, culprit):
    before = sorted(in_world.rglob("*"))
    assert refused(command("export", run, out, "--format", form), culprit)
    assert sorted(in_world.rglob("*")) == before
