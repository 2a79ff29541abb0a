"""All commands with other networks and several regions."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from dwp_pyro.inference.posterior import Posterior

pytestmark = pytest.mark.slow

SMALL = ("--widths", "8,16,32,64", "--patch", "32", "--validation", "1", "--steps", "2", "--spacing", "4")


def test_every_command_accepts_a_monai_network(copy_of_world, command):
    """Fit a prior, train centered, fine-tune all layers and the first and last, evaluate and predict."""
    form = ("--network", "segresnet", *SMALL)
    steps = [
        ("fit-prior", *form, "--bootstraps", "1", "--snapshots", "1", "--density-steps", "2", "--out", "prior"),
        ("svi", "--n", "2", *form, "--members", "1", "--prior-dir", "prior", "--out", "run"),
        (
            "finetune",
            "--n",
            "1",
            *form,
            "--init",
            "source",
            "--trainable",
            "first-last",
            "--prior-dir",
            "prior",
            "--out",
            "ft",
        ),
        ("evaluate", "run", "--samples", "2"),
        ("predict", "ft", next(copy_of_world.glob("data/brats/HGG/*/*_flair.nii.gz")), "--out", "maps"),
    ]
    for arguments in steps:
        result = command(*arguments)
        assert result.exit_code == 0, result.output
    description = json.loads((copy_of_world / "prior" / "prior.json").read_text())
    assert set(description["blocks"]) == {"input", "scale1", "scale2", "bottom", "up1", "up2", "up3"}
    assert Posterior.load(copy_of_world / "run" / "posterior.safetensors").network_config.network == "segresnet"


def test_a_prior_fits_another_network_with_other_channels(copy_of_world, command):
    """A prior of the residual U-Net and one modality fits another network; fine-tuning raises an error."""
    target = ("--n", "1", "--network", "segresnet", *SMALL, "--modality", "flair,t1", "--prior-dir", "runs/prior-ms")
    result = command("svi", *target, "--center", "none", "--out", "run")
    assert result.exit_code == 0, result.output
    result = command("finetune", *target, "--init", "source", "--out", "ft")
    assert result.exit_code == 2
    assert "the source network has network residual-unet, the target segresnet" in result.output
    assert not (copy_of_world / "ft").exists()


def test_blocks_can_be_given(copy_of_world, command):
    blocks = copy_of_world / "blocks.yaml"
    blocks.write_text("early: [input, down1, down2, down3]\nall: [down4, down5, down6, up1, up2, up3]\n")
    form = ("--widths", "2,3,4,5", "--patch", "24", "--validation", "1", "--steps", "2")
    fit = ("fit-prior", *form, "--bootstraps", "1", "--snapshots", "1", "--density-steps", "2", "--blocks", blocks)
    assert command(*fit, "--out", "prior").exit_code == 0
    fitted = json.loads((copy_of_world / "prior" / "prior.json").read_text())["blocks"]
    assert set(fitted) == {"early", "all"} and "up3.conv2.weight" in fitted["all"]["sites"]  # a name as any other
    result = command("svi", "--n", "1", *form, "--prior-dir", "prior", "--members", "1", "--out", "run")
    assert result.exit_code == 0, result.output
    written = (copy_of_world / "run" / "blocks.yaml").read_text()
    assert written.startswith("early:") and "all:" in written
    # Given blocks override those of the prior: another prior, another posterior.
    blocks.write_text("all: [input, down1, down2, down3, down4, down5, down6, up1, up2, up3]\n")
    chosen = ("--prior-dir", "prior", "--members", "1", "--blocks", blocks)
    assert command("svi", "--n", "1", *form, *chosen, "--out", "late").exit_code == 0
    assert (copy_of_world / "late" / "blocks.yaml").read_text().startswith("all:")
    one, other = (copy_of_world / run / "posterior.safetensors" for run in ("run", "late"))
    assert one.read_bytes() != other.read_bytes()
    # A resumed fit uses the blocks file of its start.
    state = copy_of_world / "prior" / "run.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"finished": False}))
    result = command(*fit, "--out", "prior", "--resume")
    assert result.exit_code == 2 and "learned_from.json: cannot continue" in result.output
    for content, phrase in {
        "half: [input]": "'half' cannot be a block's name",
        "../x: [input]": "'../x' cannot be a block's name",
        "early: [input]": "kernel 'down1.conv1.weight' is in no block",
        "early: [input, down1]\nlate: [down1, down2, down3, down4, down5, down6, up1, up2, up3]": "in two blocks",
        "early: input": "'early' must be a list",
    }.items():
        blocks.write_text(content)
        result = command("svi", "--n", "1", *form, "--blocks", blocks, "--members", "1", "--out", "other")
        assert result.exit_code == 2
        assert phrase in result.output and "blocks.yaml" in result.output


def test_a_unet_of_one_region_initializes_one_of_three(copy_of_world, command):
    form = ("--network", "unet", *SMALL)
    fit = ("fit-prior", *form, "--bootstraps", "1", "--snapshots", "1", "--density-steps", "2", "--out", "prior")
    assert command(*fit).exit_code == 0
    target = ("--n", "1", *form, "--prior-dir", "prior", "--region", "whole,core,enhancing")
    result = command("finetune", *target, "--init", "source", "--out", "run")
    assert result.exit_code == 0, result.output
    result = command("inspect-prior", "prior", "--out", "pictures")
    assert result.exit_code == 0, result.output
    assert (copy_of_world / "pictures" / "predictive.png").exists()


def test_three_regions_at_once(copy_of_world, command):
    """Overlapping regions have their own maps and metrics, and one label map with the values of the scans."""
    form = ("--widths", "2,3,4,5", "--patch", "24", "--validation", "1", "--steps", "4")
    regions = ("whole", "core", "enhancing")
    arguments = ("--n", "2", *form, "--region", ",".join(regions), "--members", "1")
    result = command("svi", *arguments, "--out", "run")
    assert result.exit_code == 0, result.output
    result = command("evaluate", "run", "--samples", "2", "--decision", "half")
    assert result.exit_code == 0, result.output
    assert all(f"run: {region}" in result.output for region in regions)
    evaluation = json.loads((copy_of_world / "run" / "evaluation.json").read_text())
    assert tuple(evaluation["regions"]) == regions
    (case, *_) = evaluation["regions"]["core"]["cases"]
    folder = copy_of_world / "run" / "predictions"
    maps = {region: nibabel.load(folder / f"{case}_prob_{region}.nii.gz").get_fdata() for region in regions}
    label = nibabel.load(folder / f"{case}_seg.nii.gz").get_fdata()
    expected = np.zeros(label.shape)
    for region, value in (("whole", 2), ("core", 1), ("enhancing", 4)):
        expected[maps[region] > 0.5] = value
    np.testing.assert_array_equal(label, expected)
    for region in regions:
        assert (folder / f"{case}_{region}.png").exists()
        assert (folder / f"{case}_mi_{region}.nii.gz").exists()
        assert 0 <= evaluation["regions"][region]["cases"][case]["dice"] <= 1


def test_a_missing_modality_is_an_error_without_modality_dropout(copy_of_world, command):
    """Training and prediction both check it."""
    form = ("--widths", "2,3,4,5", "--patch", "24", "--validation", "1", "--steps", "2", "--n", "2")
    run = ("svi", *form, "--modality", "t1,flair", "--prior", "normal")
    for scan in sorted(copy_of_world.glob("data/brats/HGG/*/*_t1.nii.gz"))[:-1]:
        scan.unlink()
    result = command(*run, "--out", "run")
    assert result.exit_code == 2
    assert "has no t1 scan (it has" in result.output and "train with modality dropout" in result.output
    result = command(*run, "--modality-dropout", "0.3", "--out", "run")
    assert result.exit_code == 0, result.output
    result = command("evaluate", "run", "--samples", "1")
    assert result.exit_code == 0, result.output
    result = command("predict", "run", "data/brats", "--samples", "0", "--out", "maps")
    assert result.exit_code == 0, result.output
    assert "label file" not in result.stderr  # a missing modality is 0 everywhere
