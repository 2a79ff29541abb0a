"""Bad input for each command: one line that names the culprit, exit code 2, nothing left behind, nothing lost."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from tests.cli.conftest import TINY

SVI_RUN = "runs/svi-brats-dwp-n2-seed0"
CASE = "data/brats/HGG/Brats18_PHA_00{}_1/Brats18_PHA_00{}_1_{}.nii.gz"
ALL_CASES = range(1, 10)


def rewrite(path: str, change) -> None:
    image = nibabel.load(path)
    data, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


def no_data(root: Path) -> None:
    (root / "data").rename(root / "elsewhere")


def wrong_layout(root: Path) -> None:
    for grade in ("brats", "ms"):
        (root / "data" / grade).rename(root / "data" / f"old-{grade}")
    (root / "data" / "old-brats").rename(root / "data" / "ms")
    (root / "data" / "old-ms").rename(root / "data" / "brats")


def truncated(root: Path) -> None:
    for i in ALL_CASES:
        path = Path(CASE.format(i, i, "flair"))
        path.write_bytes(path.read_bytes()[:2000])


def mask_of_another_shape(root: Path) -> None:
    for i in ALL_CASES:
        rewrite(CASE.format(i, i, "seg"), lambda data, affine: (data[:-1], affine))


def mask_elsewhere(root: Path) -> None:
    def shift(data, affine):
        affine[2, 3] += 30
        return data, affine

    for i in ALL_CASES:
        rewrite(CASE.format(i, i, "seg"), shift)


def missing_modality(root: Path) -> None:
    for i in ALL_CASES:
        Path(CASE.format(i, i, "flair")).unlink()


def unknown_label(root: Path) -> None:
    for i in ALL_CASES:
        rewrite(CASE.format(i, i, "seg"), lambda data, affine: (data + 7 * (data == 0).astype(data.dtype), affine))


SPOILED_SCANS = {
    no_data: "data/brats",
    wrong_layout: "data/brats",
    truncated: "_flair.nii.gz",
    mask_of_another_shape: "_seg.nii.gz",
    mask_elsewhere: "_seg.nii.gz",
    missing_modality: "case Brats18_PHA",
    unknown_label: "_seg.nii.gz",
}


def snapshot(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def check(result, before: dict[str, int], root: Path, culprit: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and culprit in lines[0], result.stderr
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert snapshot(root) == before


@pytest.mark.parametrize("spoil", SPOILED_SCANS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", ["check-data", "svi", "finetune", "predict", "evaluate", "fit-prior"])
def test_spoiled_scans(command, copy_of_world, name, spoil):
    spoil(copy_of_world)
    culprit = SPOILED_SCANS[spoil]
    arguments = {
        "check-data": ("check-data", "--dataset", "brats", "--modality", "flair"),
        "svi": ("svi", "--n", 2, *TINY, "--members", 1, "--out", "runs/new"),
        "finetune": ("finetune", "--n", 2, *TINY, "--out", "runs/new"),
        "predict": ("predict", SVI_RUN, "data/brats", "--out", "new"),
        "evaluate": ("evaluate", SVI_RUN),
        "fit-prior": ("fit-prior", "--dataset", "brats", *TINY, "--out", "runs/new"),
    }[name]
    if name == "predict" and spoil is wrong_layout:
        pytest.skip("predict takes a folder of any layout")
    if name == "predict" and culprit == "_seg.nii.gz":  # it needs no label
        result = command(*arguments)
        assert result.exit_code == 0 and f"{culprit}: " in result.output and "without its label" in result.output
        return
    before = snapshot(copy_of_world)
    check(command(*arguments), before, copy_of_world, culprit)
    assert not Path("runs/new").exists() and not Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("svi", "--n", "50"), "50 training cases"),
        (("svi", "--prior-from", "nowhere"), "nowhere"),
        (("svi", "--prior", "cauchy"), ""),
        (("svi", "--steps", "0"), "steps"),
        (("svi", "--modality", "pet"), "no pet scan"),
        (("svi", "--region", "lesion"), "'lesion' is not one of whole"),
        (("svi", "--init", "source", "--widths", "2,2,2,2"), "source.safetensors"),
        (("svi", "--no-short"), "source.safetensors"),
        (("svi", "--network", "unet"), "short: is a form of residual-unet"),
        (("svi", "--device", "cuda:9"), "cuda:9"),
        (("svi", "--split", "nowhere.json"), "nowhere.json"),
        (("svi", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("svi", "--resume"), "no run to resume"),
        (("svi", "--out", SVI_RUN), SVI_RUN),
        (("svi", "--out", "runs/prior-ms", "--overwrite"), "runs/prior-ms"),
        (("finetune", "--out", "data"), "data"),
        (("finetune", "--train", "ends"), "train"),
        (("finetune", "--init", "source", "--prior-from", "data"), "source.safetensors"),
        (("fit-prior", "--out", "runs/prior-ms"), "runs/prior-ms"),
        (("fit-prior", "--kernels", "nowhere.npy"), "nowhere.npy"),
        (("fit-prior", "--region", "core"), "'core' is not one of lesion"),
    ],
)
def test_unfit_settings(command, copy_of_world, arguments, culprit):
    tiny = () if any(option in arguments for option in ("--steps",)) else TINY
    name, *rest = arguments
    wanted = ("--n", "2") if name != "fit-prior" and "--n" not in rest else ()
    out = () if "--out" in rest else ("--out", "runs/new")
    before = snapshot(copy_of_world)
    check(command(name, *tiny, *wanted, *rest, *out), before, copy_of_world, culprit)
    assert not Path("runs/new").exists()


def spoil_prior(root: Path, how: str) -> None:
    folder = root / "runs/prior-ms"
    if how == "truncated":
        path = folder / "prior.safetensors"
        path.write_bytes(path.read_bytes()[:-64])
    elif how == "another version":
        card = json.loads((folder / "prior.json").read_text())
        (folder / "prior.json").write_text(json.dumps(card | {"format": 99}))
    elif how == "no description":
        (folder / "prior.json").write_text("{}")


@pytest.mark.parametrize("how", ["truncated", "another version", "no description"])
@pytest.mark.parametrize(
    "arguments", [("svi", "--n", 2, *TINY, "--members", 1, "--out", "runs/new"), ("score-prior", "runs/prior-ms")]
)
def test_spoiled_priors(command, copy_of_world, arguments, how):
    spoil_prior(copy_of_world, how)
    before = snapshot(copy_of_world)
    if arguments[0] == "score-prior":
        arguments = (*arguments, "--kernels", "runs/prior-ms/kernels.safetensors")
    check(command(*arguments), before, copy_of_world, "runs/prior-ms/prior.")


def test_a_prior_for_another_kernel_shape(command, copy_of_world):
    np.save("k.npy", np.random.default_rng(0).normal(size=(50, 7, 7)))
    assert command("fit-prior", "--kernels", "k.npy", "--vae-steps", 3).exit_code == 0
    before = snapshot(copy_of_world)
    result = command(
        "svi", "--n", 2, *TINY, "--members", 1, "--prior-from", "runs/prior-k", "--centre", "none", "--out", "runs/new"
    )
    check(result, before, copy_of_world, "holds 7×7 kernels, but 'input.weight' has 3×3×3")
    np.save("other.npy", np.random.default_rng(0).normal(size=(50, 5, 5)))
    before = snapshot(copy_of_world)
    result = command("score-prior", "runs/prior-k", "--kernels", "other.npy")
    check(result, before, copy_of_world, "other.npy: does not fit runs/prior-k")
    result = command("score-prior", "runs/prior-ms", "--kernels", "k.npy")
    check(result, before, copy_of_world, "k.npy: names no sites")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("predict", "nowhere", "data/brats"), "nowhere"),
        (("predict", "runs/prior-ms", "data/brats"), "runs/prior-ms"),
        (("predict", SVI_RUN, "nowhere.nii.gz"), "nowhere.nii.gz"),
        (("predict", SVI_RUN, "runs"), "runs: has none of the known layouts"),
        (("predict", SVI_RUN, CASE.format(1, 1, "flair"), CASE.format(1, 1, "t1")), "1 file(s) of one case"),
        (("predict", SVI_RUN, "data/brats", "--samples", "-1"), "samples"),
        (("predict", SVI_RUN, "data/brats", "--overlap", "1"), "overlap"),
        (
            ("predict", SVI_RUN, "data/brats", "--out", CASE.format(1, 1, "t1")),
            "is a file",
        ),
        (("evaluate", "nowhere"), "nowhere"),
        (("evaluate", SVI_RUN, "--root", "data/ms"), "data/ms"),
        (("check-data", "--root", "nowhere"), "nowhere"),
        (("check-data",), "--dataset"),
        (("phantom", "brats", "data/brats"), "data/brats"),
        (("score-prior", "nowhere", "--kernels", "x.npy"), "nowhere"),
        (("demo", "--out", "runs"), "runs"),
    ],
)
def test_unfit_paths_and_options(command, copy_of_world, arguments, culprit):
    before = snapshot(copy_of_world)
    check(command(*arguments), before, copy_of_world, culprit)


def test_a_prediction_is_not_overwritten_unasked(command, copy_of_world):
    scan = CASE.format(1, 1, "flair")
    assert command("predict", SVI_RUN, scan, "--samples", 1).exit_code == 0
    before = snapshot(copy_of_world)
    check(command("predict", SVI_RUN, scan, "--samples", 1), before, copy_of_world, "already holds a prediction")
    kept = command("predict", SVI_RUN, scan, "--samples", 1, "--resume")
    assert kept.exit_code == 0 and snapshot(copy_of_world) == before
    assert command("predict", SVI_RUN, scan, "--samples", 1, "--overwrite").exit_code == 0
    assert snapshot(copy_of_world) != before


def test_one_bad_case_among_good_ones_leaves_no_prediction(command, copy_of_world):
    path = Path(CASE.format(9, 9, "flair"))
    path.write_bytes(path.read_bytes()[:2000])
    before = snapshot(copy_of_world)
    check(command("predict", SVI_RUN, "data/brats", "--out", "new"), before, copy_of_world, str(path))
    assert not Path("new").exists()


def test_scans_of_another_root_are_predicted_anew(command, copy_of_world):
    """Maps of other scans under the same names must not pass for those of these."""
    assert command("evaluate", SVI_RUN, "--samples", 1).exit_code == 0
    marker = next(Path(SVI_RUN, "predictions").glob("*.json"))
    before = json.loads(marker.read_text())["settings"]
    Path("data/brats").rename("data/old")
    assert command("phantom", "brats", "data/brats", "--cases", 9, "--seed", 5).exit_code == 0
    result = command("evaluate", SVI_RUN, "--samples", 1)
    assert result.exit_code == 0, result.output
    after = json.loads(marker.read_text())["settings"]
    assert after["posterior"] == before["posterior"] and after["scans"] != before["scans"]


def test_a_run_is_not_resumed_on_other_cases(command, copy_of_world):
    run = Path("runs/finetune-brats-source-all-n2-seed0")
    (run / "run.json").write_text(json.dumps({"format": 1, "command": "finetune", "finished": False}))
    for path in Path("data/brats/HGG").glob("*_009_1"):
        path.rename(path.with_name(path.name.replace("Brats18", "gone")))
    result = command("finetune", "--n", 2, "--init", "source", *TINY, "--resume")
    assert result.exit_code == 2 and "split.json: cannot resume" in result.stderr


@pytest.mark.parametrize("content", ["", "- 1", "5", "a: [", "root: 5\ndataset: brats\n"])
def test_a_damaged_run_configuration(command, copy_of_world, content):
    (copy_of_world / SVI_RUN / "config.yaml").write_text(content)
    before = snapshot(copy_of_world)
    check(command("evaluate", SVI_RUN), before, copy_of_world, "config.yaml")


@pytest.mark.parametrize("damage", ["truncated", "nan", "pickle"])
def test_a_damaged_posterior(command, copy_of_world, damage):
    path = copy_of_world / SVI_RUN / "posterior.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "nan":
        content = bytearray(path.read_bytes())
        content[-4:] = np.float32(np.nan).tobytes()
        path.write_bytes(content)
    else:
        torch.save({"a": torch.ones(2)}, path)
    before = snapshot(copy_of_world)
    check(command("predict", SVI_RUN, "data/brats"), before, copy_of_world, "posterior.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder(command, in_world, tmp_path):
    tmp_path.chmod(0o500)
    result = command("finetune", "--n", 2, *TINY, "--out", tmp_path / "run")
    assert result.exit_code == 2 and str(tmp_path) in result.stderr
