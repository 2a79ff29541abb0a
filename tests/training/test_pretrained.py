"""The prior and the source networks that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import DEFAULT_WIDTHS, PRETRAINED, FinetuneConfig, SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.runtime.errors import RunOutdated
from dwp_pyro.runtime.table import markdown
from dwp_pyro.training.finetune import finetune
from dwp_pyro.training.metrics_log import read_metrics
from dwp_pyro.training.svi import svi
from dwp_pyro.training.training_data import SOURCE, resolve
from tests.world import call, error_line

FEW = {"patch": 16, "spacing": 4.0, "steps": 3, "members": 1, "n": 1, "validation": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_phantoms("brats", tmp_path / "data/brats", 4, shape=(16, 18, 16))
    return tmp_path


def test_it_states_its_data_and_license():
    provenance = json.loads((PRETRAINED / "prior.json").read_text())["provenance"]
    assert provenance["license"].startswith("CC BY")
    assert all(name in provenance["source"] for name in ("Lesjak", "Guarnera"))
    assert len(Posterior.load(PRETRAINED / SOURCE).members) == 3
    assert (PRETRAINED / "card.md").read_text() == markdown(model_card(KernelPrior.load(PRETRAINED)))
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*")) < 8 * 2**20


def test_without_a_prior_of_ones_own_it_is_used(folder):
    """Five scans, and nothing else: its networks are the center, and their widths those of the target."""
    posterior = svi(SviConfig(**FEW), RunOptions(folder / "run"))
    settings = yaml.safe_load((folder / "run/config.yaml").read_text())
    source = Posterior.load(PRETRAINED / SOURCE).network_config
    assert tuple(settings["widths"]) == posterior.network_config.widths == source.widths
    assert settings["prior_dir"] == "pretrained" and settings["center"] == "source"
    # Without their folder, which is another in another environment.
    learned_from = json.loads((folder / "run/learned_from.json").read_text())
    assert learned_from.keys() == {"scans", "prior.safetensors", SOURCE}


def test_a_prior_of_ones_own_comes_first(folder):
    assert SviConfig().prior_folder == PRETRAINED
    KernelPrior.load(PRETRAINED).save(folder / "runs/prior-ms")
    assert SviConfig().prior_folder == Path("runs/prior-ms")
    assert SviConfig(prior_dir="elsewhere").prior_folder == Path("elsewhere")
    assert SviConfig(prior_dir="pretrained").prior_folder == PRETRAINED


def test_commands_on_a_prior_know_its_name(folder):
    np.save(folder / "k.npy", np.ones((2, 3, 3, 3)))
    assert f"{PRETRAINED} has 7 blocks" in error_line(call("score-prior", "pretrained", "--kernels", "k.npy").output)


def test_the_prior_is_fixed_at_the_start(folder):
    """A fit-prior that begins or ends during a run changes nothing in it."""
    fixed = SviConfig().resolve_prior()
    KernelPrior.load(PRETRAINED).save(folder / "runs/prior-ms")
    assert fixed.prior_folder == PRETRAINED and SviConfig().resolve_prior().prior_dir == "runs/prior-ms"
    assert FinetuneConfig().resolve_prior().prior_dir is None  # a random start uses none


@pytest.fixture
def stopped(folder, monkeypatch):
    """Stop a run before its summary."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dwp_pyro.training.target._Trainer.summarize", stop)
        svi(SviConfig(**FEW), RunOptions(folder / "run"))


@pytest.mark.usefixtures("stopped")
def test_a_run_without_a_prior_of_ones_own_resumes_with_its_name(folder):
    """A prior that was made after the run had begun would be another setting."""
    KernelPrior.load(PRETRAINED).save(folder / "runs/prior-ms")
    with pytest.raises(RunOutdated, match=r"\(prior_dir was pretrained[,)]"):
        svi(SviConfig(**FEW), RunOptions(folder / "run", resume=True))
    svi(SviConfig(prior_dir="pretrained", **FEW), RunOptions(folder / "run", resume=True))


@pytest.mark.usefixtures("stopped")
def test_a_changed_label_is_detected(folder):
    case = json.loads((folder / "run/split.json").read_text())["train"][0]
    (label,) = (folder / "data/brats").rglob(f"{case}_seg.nii*")
    scan = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(scan.get_fdata()[::-1].astype("uint8"), scan.affine), label)
    with pytest.raises(RunOutdated, match=r"learned_from\.json: cannot continue, because the scans"):
        svi(SviConfig(**FEW), RunOptions(folder / "run", resume=True))


def test_widths_without_a_source_network(folder):
    assert resolve(FinetuneConfig(**FEW), 1).widths == DEFAULT_WIDTHS
    assert resolve(FinetuneConfig(**FEW, init="source"), 1).widths == (8, 16, 32, 64)
    assert resolve(FinetuneConfig(**FEW, init="source", widths=(2, 3, 4, 5)), 1).widths == (2, 3, 4, 5)
    assert resolve(SviConfig(**FEW, prior="normal"), 1).widths == DEFAULT_WIDTHS


@pytest.mark.slow
def test_all_its_networks_are_used(folder):
    svi(SviConfig(**FEW | {"members": 3}), RunOptions(folder / "svi"))
    trained = {record["stage"] for record in read_metrics(folder / "svi/metrics.jsonl")}
    assert trained >= {f"svi-member{number}" for number in range(3)}  # one that has not learned is dropped
    assert finetune(FinetuneConfig(**FEW, init="source"), RunOptions(folder / "finetune")).members
