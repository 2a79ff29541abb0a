"""Whole commands on generated scans, in process."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage
from torch.distributions import MultivariateNormal

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.prediction.outputs import read_maps, read_prediction
from dwp_pyro.prediction.predict import _cases_to_predict, _settings, load_run
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.training import target
from tests.world import SVI_RUN, TINY, error_line

FINETUNE_RUN = "runs/finetune-brats-source-all-n2-seed0"


def test_the_command_line_starts_without_torch():
    code = "import sys, dwp_pyro.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "phantom",
        "check-data",
        "fit-prior",
        "svi",
        "finetune",
        "predict",
        "evaluate",
        "report",
        "experiment",
        "score-prior",
        "inspect-prior",
        "merge-prior",
        "export",
    ],
)
def test_every_option_is_documented_with_its_default(command, name):
    from dwp_pyro.cli import main

    result = command(name, "--help")
    assert result.exit_code == 0
    without_default = {"config_file", "kernels", "split", "spacing", "format_"} | (
        {"root"} if name in ("evaluate", "report") else set()
    )
    for parameter in main.commands[name].params:
        if parameter.param_type_name == "argument" or parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        if not parameter.is_flag and parameter.name not in without_default:
            assert parameter.show_default or "[default:" in parameter.help, parameter.name


def test_a_command_uses_the_outputs_of_the_previous_one(in_world, world):
    assert "Prior: runs/prior-ms" in world.outputs["fit-prior"]
    prior = json.loads((in_world / "runs/prior-ms/prior.json").read_text())
    assert list(prior["blocks"]) == ["input", "scale1", "scale2", "bottom", "up1", "up2", "up3"]
    assert prior["blocks"]["input"]["sites"] == ["input.weight", "down1.conv1.weight"]
    # Two bootstraps, two snapshots, 2 + 2·3 kernels.
    assert prior["blocks"]["input"]["kernels"] == 2 * 2 * (2 + 2 * 3)
    for metrics in (block["nats_per_kernel"] for block in prior["blocks"].values()):
        assert set(metrics) == {"prior", "standard_normal", "isotropic", "full_gaussian"}
    bank = json.loads((in_world / "runs/prior-ms/kernels.json").read_text())
    assert [(s["bootstrap"], s["snapshot"]) for s in bank["sources"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (in_world / "runs/prior-ms/kernels.png").read_bytes().startswith(b"\x89PNG")
    assert (in_world / SVI_RUN / "posterior.safetensors").exists()
    config = yaml.safe_load((in_world / SVI_RUN / "config.yaml").read_text())
    assert config["widths"] == [2, 3, 4, 5] and config["prior"] == "dwp"
    split = json.loads((in_world / SVI_RUN / "split.json").read_text())
    assert len(split["train"]) == 2 and len(split["test"]) == 2
    metrics = [json.loads(line) for line in (in_world / SVI_RUN / "metrics.jsonl").read_text().splitlines()]
    member = [line for line in metrics if line["stage"] == "svi-member1"]
    assert member[-1]["step"] == 2 and "validation_dice" in member[-1] and "kl" in member[-1]
    state = json.loads((in_world / SVI_RUN / "run.json").read_text())
    assert state["finished"] and set(state["summary"]["blocks"]) == set(prior["blocks"])
    assert {"elbo", "elbo_prior", "elbo_frozen", "log_likelihood", "kl", "members"} <= set(state["summary"])
    assert list((in_world / SVI_RUN / "tensorboard").iterdir())
    assert not list((in_world / SVI_RUN).glob("checkpoint*"))


def test_check_data_prints_a_table_and_json(command, in_world):
    result = command("check-data", "--root", "data/brats")
    assert result.exit_code == 0
    assert "Layout brats, 9 cases" in result.output
    result = command("check-data", "--dataset", "ms", "--json")
    report = json.loads(result.stdout)
    assert report["layout"] == "openms"
    case = report["cases"][0]
    assert case["id"] == "patient01" and case["problems"] == []
    label = np.asarray(nibabel.load("data/ms/patient01/patient01_consensus_gt.nii.gz").dataobj)
    assert case["labels"] == {"lesion": int((label == 1).sum())}
    assert case["shape"] == [28, 32, 28] and case["spacing"] == [3.0, 3.0, 3.0]


def test_the_data_variable_points_to_the_scans(command, in_world, tmp_path, monkeypatch):
    monkeypatch.setenv("DWP_PYRO_DATA", str(in_world / "data"))
    monkeypatch.chdir(tmp_path)
    assert command("check-data", "--dataset", "brats").exit_code == 0


def test_masks_follow_the_decision(command, copy_of_world):
    """The one that training chose, here replaced by another; or the largest component."""
    path = Path(SVI_RUN) / "posterior.safetensors"
    posterior = Posterior.load(path)
    assert json.loads((path.parent / "run.json").read_text())["decision"] == posterior.decision.to_mapping()
    posterior.decision = Decision("expected-dice", 0.25, ("x",))
    posterior.save(path)
    scans = next(Path("data/brats").rglob("*_flair.nii.gz"))
    for name, min_mass in (("learned", 0.25), ("largest", 1.0)):
        result = command("predict", SVI_RUN, scans, "--samples", 1, "--decision", name, "--out", name)
        assert result.exit_code == 0, result.output
        (marker,) = Path(name).glob("*.json")
        settings = json.loads(marker.read_text())["settings"]
        assert settings["decision"] == {"threshold": "expected-dice", "min_mass": min_mass, "mirror": ["x"]}
        assert settings["samples"] == 2 * len(posterior.members)  # one plain, one mirrored each
        probability = read_maps(Path(name), marker.stem, "prob", posterior.network_config)
        image = nibabel.load(f"{name}/{marker.stem}_seg.nii.gz")
        spacing = image.header.get_zooms()
        record = read_prediction(Path(name), marker.stem, posterior.network_config.regions)
        expected = posterior.network_config.masks(probability, record.decision, spacing)
        segmented = np.asarray(image.dataobj)
        np.testing.assert_array_equal(segmented, expected[0])
        assert segmented.any()
    assert ndimage.label(segmented, np.ones((3, 3, 3)))[1] == 1


@pytest.mark.parametrize("run", [SVI_RUN, pytest.param(FINETUNE_RUN, marks=pytest.mark.slow)])
def test_predictions_lie_on_the_scans_grid(command, in_world, tmp_path, run):
    out = tmp_path / "p"
    result = command("predict", run, "data/two", "--samples", 2, "--decision", "half", "--out", out)
    assert result.exit_code == 0, result.output
    assert "label file" not in result.stderr
    path = next(Path("data/two").rglob("*_flair.nii.gz"))
    name, scan = path.parent.name, nibabel.load(path)
    maps = {}
    for kind in ("seg", "prob", "entropy", "mi"):
        image = nibabel.load(out / f"{name}_{kind}.nii.gz")
        np.testing.assert_array_equal(image.affine, scan.affine)
        assert image.header["sform_code"] == scan.header["sform_code"]
        assert image.shape == scan.shape
        maps[kind] = np.asarray(image.dataobj)
    outside = np.asarray(scan.dataobj) == 0
    assert all((values[outside] == 0).all() for values in maps.values())
    np.testing.assert_array_equal(maps["seg"], maps["prob"] > 0.5)
    assert maps["entropy"].max() <= np.log(2) + 1e-5
    assert (maps["mi"] <= maps["entropy"] + 1e-5).all()
    assert (maps["mi"].max() > 0) == (run == SVI_RUN)
    (record,) = json.loads((out / f"{name}.json").read_text())["regions"].values()
    for kind, key in (("entropy", "mean_entropy_of_brain"), ("mi", "mean_mutual_information_of_brain")):
        assert record[key] == pytest.approx(maps[kind][~outside].mean(), rel=1e-3)
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.glob("*_seg.nii.gz"))) == 2


def test_a_label_file_in_place_of_a_scan_is_a_warning(command, in_world, tmp_path):
    label = next(Path("data/two").rglob("*_seg.nii.gz"))
    result = command("predict", SVI_RUN, label, "--samples", 0, "--out", tmp_path / "p")
    assert f"{label}: holds only 4 different values; is it a label file?" in result.stderr


@pytest.mark.slow
def test_prediction_of_single_files_agrees_with_that_of_the_folder(command, in_world, tmp_path):
    name = "Brats18_PHA_004_1"
    file = f"data/brats/HGG/{name}/{name}_flair.nii.gz"
    for scans, out in ((file, "one"), ("data/brats", "all")):
        assert command("predict", SVI_RUN, scans, "--samples", 2, "--out", tmp_path / out).exit_code == 0
    one = nibabel.load(tmp_path / "one" / f"{name}_flair_prob.nii.gz")
    several = nibabel.load(tmp_path / "all" / f"{name}_prob.nii.gz")
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(several.dataobj))


def test_a_file_whose_name_contradicts_the_modality_is_a_warning(command, in_world, tmp_path):
    t1 = next(Path("data/two").rglob("*_t1.nii.gz"))
    result = command("predict", SVI_RUN, t1, "--samples", 0, "--out", tmp_path / "p")
    assert f"{t1}: is read as the modality flair, which its name contradicts" in result.stderr
    flair = t1.with_name(t1.name.replace("_t1.", "_flair."))
    assert "contradicts" not in command("predict", SVI_RUN, flair, "--samples", 0, "--out", tmp_path / "q").stderr


def test_evaluation_agrees_with_the_predictions(command, copy_of_world):
    result = command("evaluate", SVI_RUN, "--samples", 2)
    assert result.exit_code == 0, result.output
    assert "Empty masks" in result.output
    with open(f"{SVI_RUN}/evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    report = json.loads((copy_of_world / SVI_RUN / "evaluation.json").read_text())
    whole = report["regions"]["whole"]
    assert [row["case"] for row in rows] == list(whole["cases"])
    assert {row["region"] for row in rows} == {"whole"} and all(row["patient"] == row["case"] for row in rows)
    for row in rows:
        truth = nibabel.load(f"data/brats/HGG/{row['case']}/{row['case']}_seg.nii.gz")
        predicted = nibabel.load(f"{SVI_RUN}/predictions/{row['case']}_seg.nii.gz")
        a, b = np.asarray(truth.dataobj) > 0, np.asarray(predicted.dataobj) > 0
        assert float(row["dice"]) == pytest.approx(2 * (a & b).sum() / max(1, a.sum() + b.sum()), abs=1e-6)
    mean = np.mean([float(row["nll"]) for row in rows])
    assert whole["summary"]["nll"]["mean"] == pytest.approx(mean)
    records = [json.loads((copy_of_world / SVI_RUN / f"predictions/{row['case']}.json").read_text()) for row in rows]
    assert [float(row["pairwise_dice"]) for row in rows] == pytest.approx(
        [record["regions"]["whole"]["pairwise_dice"] for record in records]
    )
    assert whole["curves"]["case_risk_coverage"]["score"] == "pairwise Dice"
    # A second evaluation reuses the predictions.
    again = command("evaluate", SVI_RUN, "--samples", 2)
    assert "predicting" not in again.stderr
    assert json.loads((copy_of_world / SVI_RUN / "evaluation.json").read_text()) == report


def test_curves_of_the_test_cases(command, copy_of_world):
    """Reliability is summed over cases, voxel risk averaged; after a single pass cases are sorted by entropy."""
    assert command("evaluate", FINETUNE_RUN).exit_code == 0
    report = json.loads((copy_of_world / FINETUNE_RUN / "evaluation.json").read_text())["regions"]["whole"]
    brain_mask = 0
    for case in report["cases"]:
        scan = nibabel.load(f"data/brats/HGG/{case}/{case}_flair.nii.gz")
        brain_mask += int((np.asarray(scan.dataobj) != 0).sum())
    curves = report["curves"]
    assert len(curves["reliability"]["count"]) == 15 and sum(curves["reliability"]["count"]) == brain_mask
    assert len(curves["risk_coverage"]["coverage"]) == 100
    assert np.mean(curves["risk_coverage"]["risk"]) == pytest.approx(report["summary"]["aurc"]["mean"])
    case_curve = curves["case_risk_coverage"]
    assert case_curve["score"] == "mean entropy of the brain" and case_curve["coverage"] == [0.5, 1.0]
    assert case_curve["risk"][-1] == pytest.approx(1 - report["summary"]["dice"]["mean"])
    assert case_curve["aurc"] == pytest.approx(np.mean(case_curve["risk"]))
    assert "pairwise_dice" not in report["summary"]
    for name in ("reliability.png", "risk_coverage.png"):
        assert (copy_of_world / FINETUNE_RUN / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--prior", "normal"),
        ("--prior", "log-uniform"),
        ("--prior", "dwp", "--estimator", "local"),
        ("--prior", "dwp", "--init", "source", "--likelihood", "categorical"),
        ("--prior", "normal", "--init", "prior", "--region", "core"),
    ],
)
def test_options_select_prior_start_estimator_and_likelihood(command, in_world, tmp_path, options):
    result = command("svi", "--n", 2, *TINY, "--members", 1, *options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output


def test_the_finetuning_methods(command, in_world, tmp_path):
    from dwp_pyro.runtime.tensors import load_tensors

    sources, _ = load_tensors(in_world / "runs/prior-ms/source.safetensors")
    source = {name: w for name, w in sources.items() if name.startswith("0.")}

    def equal_to_source(run: Path) -> set[str]:
        tensors, _ = load_tensors(run / "posterior.safetensors")
        return {name for name in source if (tensors[name] == source[name]).all()}

    assert not equal_to_source(in_world / FINETUNE_RUN)  # --init source
    result = command(
        "finetune", "--n", 2, "--init", "source", "--trainable", "first-last", *TINY, "--out", tmp_path / "a"
    )
    assert result.exit_code == 0, result.output
    ends = tuple(f"0.network.{end}" for end in ("input.", "down1.", "up3.", "norm.", "output."))
    assert equal_to_source(tmp_path / "a") == {name for name in source if not name.startswith(ends)}
    still = ("--steps", 1, "--learning-rate", 0)
    result = command("finetune", "--n", 2, "--init", "random", *TINY, *still, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert not {name for name in equal_to_source(tmp_path / "b") if source[name].dim() == 5}


def test_options_override_a_config_file_and_files_are_in_the_order_of_the_modalities(command, in_world, tmp_path):
    settings = {"n": 1, "steps": 2, "widths": [2, 3, 4, 5], "patch": 24, "validation": 0, "spacing": 4, "seed": 5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings | {"modality": ["t1", "flair"]}))
    out = tmp_path / "run"
    result = command("finetune", "--config", tmp_path / "c.yaml", "--steps", 3, "--out", out)
    assert result.exit_code == 0, result.output
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["n"], config["steps"], config["validation"], config["seed"]) == (1, 3, 0, 5)
    name = "Brats18_PHA_004_1"
    t1, flair = (Path(f"data/brats/HGG/{name}/{name}_{modality}.nii.gz") for modality in ("t1", "flair"))
    data = _cases_to_predict([t1, flair], Posterior.load(out / "posterior.safetensors"))
    assert data.cases[0].images == {"t1": t1, "flair": flair}
    result = command("predict", out, t1, flair, "--out", tmp_path / "p")
    assert result.exit_code == 0, result.output
    assert nibabel.load(tmp_path / "p" / f"{name}_t1_prob.nii.gz").shape == (28, 32, 28)


def test_kernels_of_another_network_become_a_prior(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(300, 1, 7, 7)).cumsum(-1).cumsum(-2)
    np.save("train.npy", smooth[:200])
    np.save("test.npy", smooth[200:])
    result = command("fit-prior", "--kernels", "train.npy", "--density-steps", 20)
    assert result.exit_code == 0, result.output
    scored = command("score-prior", "runs/prior-train", "--kernels", "test.npy", "--json")
    assert scored.exit_code == 0, scored.output
    report = json.loads(scored.stdout)
    assert report["kernels"] == 100
    nats = report["nats_per_kernel"]
    flat = torch.from_numpy(smooth[:200].reshape(200, -1)).double()
    held_out = torch.from_numpy(smooth[200:].reshape(100, -1)).double()
    gaussian = MultivariateNormal(flat.mean(0), torch.cov(flat.T) + 1e-6 * torch.eye(49))
    assert nats["full_gaussian"] == pytest.approx(float(gaussian.log_prob(held_out).mean()), abs=3)
    assert nats["prior"] > nats["full_gaussian"] - 1
    assert nats["full_gaussian"] > nats["standard_normal"]


def test_a_bank_is_scored_block_by_block(command, in_world):
    bank = "runs/prior-ms/kernels.safetensors"
    result = command("score-prior", "runs/prior-ms", "--kernels", bank, "--samples", 5, "--json")
    assert result.exit_code == 0, result.output
    prior, total, count = KernelPrior.load(Path("runs/prior-ms")), 0.0, 0
    for site, kernels in read_kernels(Path(bank)).kernels.items():
        density = prior.block_at(site, (0, 0, *kernels.shape[1:]))
        gaussian = MultivariateNormal(density.loc, scale_tril=density.scale_tril)
        total += float(gaussian.log_prob(kernels.flatten(1)).sum())
        count += len(kernels)
    scored = json.loads(result.stdout)
    assert scored["kernels"] == count
    assert scored["nats_per_kernel"]["full_gaussian"] == pytest.approx(total / count, rel=1e-4)


def test_overwrite_replaces_a_run(command, copy_of_world):
    Path(FINETUNE_RUN, "mine").touch()
    result = command("finetune", "--n", 2, "--init", "source", *TINY, "--steps", 2, "--overwrite")
    assert result.exit_code == 0, result.output
    assert not Path(FINETUNE_RUN, "mine").exists()
    assert yaml.safe_load(Path(FINETUNE_RUN, "config.yaml").read_text())["steps"] == 2


def test_phantom_writes_the_layout(command, tmp_path):
    result = command("phantom", "brats", tmp_path / "d", "--cases", 2)
    assert result.exit_code == 0
    assert command("check-data", "--root", tmp_path / "d").exit_code == 0


@pytest.mark.parametrize(("run", "samples"), [(SVI_RUN, 4), (FINETUNE_RUN, 1)])
def test_every_member_has_the_same_number_of_samples(in_world, run, samples):
    """Round 3 samples up to 4 for two members; use 1 without a posterior; 0 means the posterior means."""
    trained = load_run(Path(run))
    case = _cases_to_predict([next(Path("data/two").rglob("*_flair.nii.gz"))], trained.posterior).cases[0]
    for requested, used in ((3, samples), (0, 0)):
        assert _settings(trained, case, PredictConfig(samples=requested, decision="half"))["samples"] == used


@pytest.mark.slow
def test_bf16_is_a_setting_of_training_and_of_prediction(command, in_world, tmp_path):
    run = tmp_path / "run"
    config = in_world / SVI_RUN / "config.yaml"
    assert command("svi", "--config", config, "--precision", "bf16", "--steps", 2, "--out", run).exit_code == 0
    maps = {}
    for precision in ("float32", "bf16"):
        out = tmp_path / precision
        result = command("predict", run, "data/brats", "--samples", 0, "--precision", precision, "--out", out)
        assert result.exit_code == 0, result.output
        records = [json.loads(path.read_text()) for path in out.glob("*.json")]
        assert {record["settings"]["precision"] for record in records} == {precision}
        maps[precision] = np.asarray(nibabel.load(out / "Brats18_PHA_004_1_prob.nii.gz").dataobj)
    np.testing.assert_allclose(maps["bf16"], maps["float32"], atol=0.05)
    assert not np.array_equal(maps["bf16"], maps["float32"])


def _out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("name", ["svi", "finetune", "fit-prior", "predict"])
def test_too_little_device_memory_is_reported(command, copy_of_world, monkeypatch, name):
    """Memory may run out while the network moves to the device, or in a step."""
    cases = ("--n", 2) if name in ("svi", "finetune") else ()
    arguments = (SVI_RUN, "data/two") if name == "predict" else (*TINY, *cases)
    trained = "dwp_pyro.models.segmentation.SegmentationModel"
    predicted = "dwp_pyro.inference.posterior.Posterior"
    for place in (
        (f"{predicted}.to", f"{predicted}.logits") if name == "predict" else (f"{trained}.to", f"{trained}.forward")
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, _out_of_memory)
            result = command(name, *arguments, "--out", "new", "--overwrite")
        assert result.exit_code == 2, result.output
        line = error_line(result.stderr)
        assert "ran out of memory" in line and ("new" in line or "case Brats18" in line)


def test_nan_in_the_output_of_a_network_is_reported(command, in_world, tmp_path, monkeypatch):
    """Finite weights that are too large make the output infinite."""
    logits = Posterior.logits
    monkeypatch.setattr(Posterior, "logits", lambda *arguments: logits(*arguments) * torch.inf)
    result = command("predict", SVI_RUN, "data/two", "--out", tmp_path / "new")
    line = error_line(result.stderr)
    assert result.exit_code == 2 and "case Brats18" in line and "NaN" in line and "train it again" in line
    assert not list(tmp_path.rglob("*_prob.nii.gz"))


def test_a_study_of_two_methods(command, in_world, tmp_path):
    settings = {"root": "data/brats", "widths": [2, 3, 4, 5], "patch": 24, "validation": 1, "steps": 2, "members": 1}
    methods = {"DWP": {"command": "svi", "prior": "dwp"}, "UNet-RI": {"command": "finetune", "init": "random"}}
    runs = [{"methods": list(methods), "n": [2], "seeds": [0]}]
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"settings": settings, "methods": methods, "runs": runs, "samples": 1}))
    result = command("experiment", study, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    with open(tmp_path / "out" / "results.csv") as file:
        assert {row["method"] for row in csv.DictReader(file)} == set(methods)
    assert (tmp_path / "out" / "table.md").exists()


@pytest.mark.slow
def test_test_cases_that_trained_the_source_networks_are_a_warning(command, copy_of_world):
    common = ("finetune", "--root", "data/ms", "--init", "source", "--n", 2, *TINY, "--prior-dir", "runs/prior-ms")
    for seed, seen in ((0, False), (1, True)):
        result = command(*common, "--seed", seed, "--out", f"run{seed}")
        assert result.exit_code == 0, result.output
        assert ("so their metrics will be too good" in result.stderr) == seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svi", "finetune"])
def test_unlabelled_scans_are_labeled_by_a_first_round(command, copy_of_world, name, monkeypatch):
    """Scans without labels, in a folder beside; and those of the data set itself, without the cases of the split."""
    evaluated = []
    evaluate = target.evaluate_elbo
    monkeypatch.setattr(target, "evaluate_elbo", lambda model, *rest: evaluated.append(model) or evaluate(model, *rest))
    shutil.copytree("data/two", "more")
    for path in Path("more").rglob("*_seg.nii.gz"):
        path.unlink()
    result = command(name, "--n", 2, *TINY, "--unlabelled", "more", "--out", "run")
    assert result.exit_code == 0, result.output
    stages = {json.loads(line)["stage"] for line in Path("run/metrics.jsonl").read_text().splitlines()}
    assert {stage.split("-member")[0] for stage in stages} >= {name, f"{name}-student"}
    assert len(json.loads(Path("run/split.json").read_text())["unlabelled"]) == 2
    assert not list(Path("run").glob("checkpoint*"))
    # The ELBO of the members is that of the labeled cases, as that of the null models is.
    assert {(model.num_cases, model.evidence) for model in evaluated} == ({(2, 50_000)} if name == "svi" else set())
    Path("run/run.json").write_text(json.dumps({"format": 1, "command": name, "finished": False}))
    scan = next(Path("more").rglob("*_flair.nii.gz"))
    scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes()), 1))
    changed = command(name, "--n", 2, *TINY, "--unlabelled", "more", "--out", "run", "--resume")
    assert changed.exit_code == 2 and "learned_from.json: cannot continue" in changed.stderr
    again = command(name, "--n", 2, *TINY, "--root", "data/brats", "--unlabelled", "data/brats", "--out", "other")
    assert again.exit_code == 0, again.output
    roles = json.loads(Path("other/split.json").read_text())
    assert len(roles.pop("unlabelled")) == 9 - sum(map(len, roles.values())) == 4
    none = command(name, "--n", 6, *TINY, "--root", "data/brats", "--unlabelled", "data/brats", "--out", "none")
    assert none.exit_code == 2
    assert "data/brats: holds no scan beside those of the split" in none.stderr
    assert not Path("none").exists()
