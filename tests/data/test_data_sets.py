"""Training, evaluation and prediction with data sets of other layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from dwp_pyro.cli import main
from dwp_pyro.data.case import Scan
from dwp_pyro.data.check import check_data
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.evaluation import report
from dwp_pyro.evaluation.evaluate import _measure
from dwp_pyro.evaluation.viewer import case_view
from dwp_pyro.inference.posterior import Posterior

TINY = ("--widths", "2,3,4,5", "--patch", "16", "--validation", "1", "--steps", "2", "--n", "1")
SHAPE = (16, 18, 20)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Three labeled cases with two modalities, and one without a label."""
    rng = np.random.default_rng(0)
    for number in range(4):
        images = rng.integers(1, 100, (*SHAPE, 2)).astype(np.int16)
        images[0] = 0
        part = "Tr" if number < 3 else "Ts"
        save(tmp_path / f"msd/images{part}/C_{number}.nii.gz", images)
        if part == "Tr":
            label = np.zeros(SHAPE, np.uint8)
            label[4:8, 4:8, 4:8], label[8:10, 4:8, 4:8], label[10:12, 4:8, 4:8] = 1, 2, 3
            save(tmp_path / f"msd/labelsTr/C_{number}.nii.gz", label)
    about = {
        "modality": {"0": "FLAIR", "1": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    }
    (tmp_path / "msd/dataset.json").write_text(json.dumps(about))
    return tmp_path / "msd"


def test_channels_in_all_commands(decathlon, tmp_path, monkeypatch):
    """The layout is detected; training skips the case without a label and predict does not; maps are 3-D."""
    monkeypatch.chdir(tmp_path)
    result = command("finetune", "--root", "msd", "--modality", "t2", "--region", "core", *TINY)
    assert result.exit_code == 0, result.output
    assert "1 of 4 cases" in result.output and "C_3" in result.output
    run = tmp_path / "runs/finetune-msd-random-all-n1-seed0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["dataset"], config["root"], config["region"]) == ("msd", "msd", ["core"])
    assert "C_3" not in str(json.loads((run / "split.json").read_text()))
    assert command("evaluate", run, "--samples", 1).exit_code == 0
    Path("new").mkdir()
    for name in ("imagesTs", "dataset.json"):
        Path("new", name).symlink_to(tmp_path / "msd" / name)
    result = command("predict", run, "new", "--samples", 1, "--out", "maps")
    assert result.exit_code == 0, result.output
    scan = nibabel.load("msd/imagesTs/C_3.nii.gz")
    for kind, dtype in (("seg", np.uint8), ("prob", np.float32)):
        image = nibabel.load(f"maps/C_3_{kind}.nii.gz")
        assert image.shape == SHAPE and image.get_data_dtype() == dtype
        assert image.header["dim"].tolist() == [3, *SHAPE, 1, 1, 1, 1]
        np.testing.assert_array_equal(image.affine, scan.affine)
        assert image.header["qform_code"] == scan.header["qform_code"]
    digests = json.loads(Path("maps/C_3.json").read_text())["settings"]["scans"]
    assert len(digests) == 1
    # The same files, with the names of the channels corrected, are other scans.
    about = json.loads(Path("msd/dataset.json").read_text())
    for name, done in (("T2w", 0), ("T1w", 1)):
        about["modality"] = {"0": "T2w", "1": name} if done else {"0": "FLAIR", "1": name}
        Path("msd/dataset.json").write_text(json.dumps(about))
        result = command("predict", run, "new", "--samples", 1, "--out", "maps", "--resume")
        assert result.exit_code == 0, result.output
        assert json.loads(Path("maps/C_3.json").read_text())["settings"]["channels"]["t2"] == 1 - done


def test_a_split_may_not_name_a_case_without_a_label(decathlon, tmp_path):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["C_0", "C_1"], "test": ["C_3"]}))
    out = tmp_path / "run"
    result = command("finetune", "--root", decathlon, "--modality", "t2", *TINY, "--split", split, "--out", out)
    assert result.exit_code == 2 and "split.json: case 'C_3' has no label file" in result.output
    assert not out.exists()


def test_check_data_reports_what_training_skips(decathlon):
    result = command("check-data", "--root", decathlon)
    assert result.exit_code == 0, result.output
    # 64 voxels of 12 mm³, and twice 32
    assert "oedema 0.8, non-enhancing 0.4, enhancing 0.4" in result.output
    assert "none: training skips it" in result.output and "1 of 4 cases have no label" in result.output
    assert "every case has flair, t2: train on several with --modality flair,t2 --modality-dropout" in result.output
    report = json.loads(command("check-data", "--root", decathlon, "--json").stdout)
    assert report["layout"] == "msd" and report["regions"]["core"] == [2, 3]
    assert report["cases"][0] == {
        "id": "C_0",
        "modalities": ["flair", "t2"],
        "label": True,
        "labels": {"oedema": 64, "non-enhancing": 32, "enhancing": 32},
        "spacing": [2.0, 2.0, 3.0],
        "shape": list(SHAPE),
        "problems": [],
    }
    assert report["cases"][3]["label"] is False and report["cases"][3]["problems"] == []


def test_check_data_names_an_empty_scan_of_several(tmp_path):
    """Training on that modality alone would refuse the case."""
    write_phantoms("brats", tmp_path, 1, shape=(16, 16, 16))
    (path,) = tmp_path.rglob("*_t1.nii.gz")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), path)
    (case,) = check_data(open_dataset(tmp_path))["cases"]
    assert case["problems"] == [f"{path}: is 0 everywhere, an empty t1 scan"]


@pytest.fixture
def manifest(decathlon: Path, tmp_path: Path) -> Path:
    """The same scans, one file per modality, in a CSV file."""
    lines = ["id,flair,label"]
    for number in range(3):
        volume = np.asarray(nibabel.load(decathlon / f"imagesTr/C_{number}.nii.gz").dataobj)[..., 0]
        save(tmp_path / f"flat/{number}.nii.gz", volume)
        lines.append(f"case{number},flat/{number}.nii.gz,msd/labelsTr/C_{number}.nii.gz")
    path = tmp_path / "scans.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_manifest_in_all_commands(manifest, tmp_path, monkeypatch):
    """It needs names of its label values; the run keeps them for evaluation."""
    monkeypatch.chdir(tmp_path)
    train = ("finetune", "--root", "scans.csv", *TINY)
    result = command(*train)
    assert result.exit_code == 2 and not Path("runs").exists()
    assert (
        "scans.csv: (manifest) does not define the meaning of its label values; name label values with --label-map"
        in result.stderr
    )
    result = command("check-data", "--root", "scans.csv", "--label-map", "1=cyst", "--json")
    assert result.exit_code == 2 and "unknown label value 2 (0 background, 1 cystic-component)" in result.stderr
    result = command(*train, "--label-map", "1=white matter,2=stroke,3=ignore", "--region", "stroke", "--out", "run")
    assert result.exit_code == 0, result.output
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["label_map"] == ["1=white matter", "2=stroke", "3=ignore"] and config["dataset"] == "manifest"
    result = command("evaluate", "run", "--samples", 1)
    assert result.exit_code == 0, result.output
    Path("one.csv").write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    result = command("predict", "run", "one.csv", "--samples", 1, "--out", "maps")  # needs no names of labels
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("maps").glob("*_seg.nii.gz")] == ["case0_seg.nii.gz"]


def test_metrics_exclude_ignored_voxels():
    """The prediction is correct except in the ignored third of the brain."""
    brain_mask = np.ones((6, 5, 4), bool)
    label = np.zeros(brain_mask.shape, np.int16)
    label[:2], label[2] = 2, 1
    probability = (label > 0).astype(np.float32)
    scan = Scan("c", np.ones((1, *brain_mask.shape), np.float32), brain_mask, label, np.eye(4), Path("c"), label == 2)
    data = DataSet(Path("c"), "wmh2017", (), {1: "lesion", 2: "ignore"}, {"lesion": frozenset({1})})
    entropy = np.zeros(brain_mask.shape, np.float32)
    metrics = _measure(probability, probability > 0.5, entropy, np.nan, scan, data, "lesion").measures
    assert metrics["dice"] == 1 and metrics["hd95"] == 0
    assert metrics["nll"] == pytest.approx(0, abs=1e-5) and metrics["ece"] == pytest.approx(0)
    counted = _measure(
        probability, probability > 0.5, entropy, np.nan, dataclasses.replace(scan, ignored=None), data, "lesion"
    ).measures
    assert counted["dice"] == 0.5 and counted["nll"] > 1


def test_training_excludes_ignored_voxels(tmp_path, monkeypatch):
    """The weights do not depend on the value of ignored voxels; they differ if these are background."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    posteriors = []
    images = [rng.integers(1, 100, SHAPE).astype(np.int16) for _ in range(3)]
    for value, options in ((2, ()), (3, ("--label-map", "3=ignore")), (4, ("--label-map", "4=background"))):
        for number, image in enumerate(images):
            label = np.zeros(SHAPE, np.uint8)
            label[4:8, 4:8, 4:8] = 1
            label[10:14, 4:8, 4:8] = value
            save(tmp_path / f"wmh{value}/Utrecht/{number}/pre/FLAIR.nii.gz", image)
            save(tmp_path / f"wmh{value}/Utrecht/{number}/wmh.nii.gz", label)
        out = tmp_path / f"run{value}"
        result = command("finetune", "--root", f"wmh{value}", *TINY, *options, "--out", out)
        assert result.exit_code == 0, result.output
        posteriors.append((out / "posterior.safetensors").read_bytes())
    assert posteriors[0] == posteriors[1] != posteriors[2]


def test_an_invalid_label_map(tmp_path):
    result = command("svi", "--label-map", "1:oedema", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "label-map: '1:oedema' is not of the form 1=oedema" in result.stderr


@pytest.mark.slow
def test_labels_that_exclude_each_other_are_classes_in_all_commands(decathlon, tmp_path, monkeypatch):
    """Without --region, labels of no tumor are classes of one softmax in training, maps, metrics and export."""
    monkeypatch.chdir(tmp_path)
    about = json.loads((decathlon / "dataset.json").read_text())
    about["labels"] = {"0": "background", "1": "anterior", "2": "posterior", "3": "middle"}
    (decathlon / "dataset.json").write_text(json.dumps(about))
    result = command("finetune", "--root", "msd", "--modality", "t2", *TINY, "--out", "run")
    assert result.exit_code == 0, result.output
    network_config = Posterior.load(tmp_path / "run/posterior.safetensors").network_config
    assert network_config.regions == ("anterior", "posterior", "middle") and network_config.activation == "softmax"
    assert command("evaluate", "run", "--samples", 1, "--decision", "half").exit_code == 0
    assert command("export", "run", "nnunet", "--format", "nnunet").exit_code == 0
    labels = json.loads(Path("nnunet/dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "anterior": 1, "posterior": 2, "middle": 3}
    (case,) = json.loads(Path("run/split.json").read_text())["test"]
    maps = [
        nibabel.load(f"run/predictions/{case}_prob_{region}.nii.gz").get_fdata() for region in network_config.regions
    ]
    total = np.sum(maps, 0)
    assert total.max() <= 1 + 1e-5
    classes = np.argmax([1 - total, *maps], 0)
    for path in (f"run/predictions/{case}_seg.nii.gz", f"nnunet/{case}.nii.gz"):
        np.testing.assert_array_equal(nibabel.load(path).get_fdata(), classes)
    metrics = json.loads(Path(f"run/predictions/{case}.json").read_text())["regions"]
    truth = nibabel.load(decathlon / f"labelsTr/{case}.nii.gz").get_fdata()
    scores = json.loads(Path("run/evaluation.json").read_text())["regions"]
    for value, region in enumerate(network_config.regions, start=1):
        predicted = classes == value
        assert metrics[region]["volume_ml"] == pytest.approx(predicted.sum() * 12 / 1000)
        dice = 2 * (predicted & (truth == value)).sum() / (predicted.sum() + (truth == value).sum())
        assert scores[region]["cases"][case]["dice"] == pytest.approx(dice)
    shown = []
    monkeypatch.setattr(report, "case_view", lambda *arguments: shown.append(arguments) or case_view(*arguments))
    for region, value in ((), 1), (("--region", "middle"), 3):
        assert command("report", "run", *region).exit_code == 0
        _, _, _, _, label, mask, probability, _, _ = shown.pop()
        np.testing.assert_array_equal(label, truth == value)
        np.testing.assert_array_equal(mask, classes == value)
        np.testing.assert_array_equal(probability, maps[value - 1])
