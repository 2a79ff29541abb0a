"""Priors other than the VAE: learned, selected, centered on the source; kernels drawn from a prior, and L2-SP."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from dwp_pyro.config.names import FAMILIES
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.runtime.tensors import load_tensors
from tests.world import TINY, World, call, error_line

pytestmark = pytest.mark.slow

BANK = "runs/prior-ms/kernels.safetensors"


def tensors(path: Path) -> dict[str, Tensor]:
    return load_tensors(path)[0]


def network(path: Path, number: int = 0) -> dict[str, Tensor]:
    """Return name → weight of a deterministic member."""
    prefix = f"{number}.network."
    return {name.removeprefix(prefix): w for name, w in tensors(path).items() if name.startswith(prefix)}


def source(folder: Path = Path("runs/prior-ms"), number: int = 0) -> dict[str, Tensor]:
    """Return name → weight of a source network, by default the best."""
    return network(folder / "source.safetensors", number)


def last_metrics(run: Path) -> dict[str, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == "svi"][-1]


@pytest.fixture(scope="session")
def auto(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit a prior of the best family to the kernel bank of the world."""
    out = tmp_path_factory.mktemp("auto") / "prior"
    result = call("fit-prior", "--kernels", world.path / BANK, "--family", "auto", "--density-steps", 15, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_auto_reports_every_family_and_selects_the_best(auto):
    """The family with the highest mean over all kernels is selected; blocks record the scores of all families."""
    description = json.loads((auto / "prior.json").read_text())
    blocks = description["blocks"].values()
    nats = {f: sum(b["kernels"] * b["nats_per_kernel"][f] for b in blocks) for f in FAMILIES}
    assert description["family"] == max(nats, key=nats.get)
    assert len(set(nats.values())) > 1
    for block in blocks:
        metrics = block["nats_per_kernel"]
        assert set(metrics) == {"prior", "standard_normal", "isotropic", "full_gaussian", *FAMILIES}
        assert metrics["prior"] == metrics[description["family"]]
        assert metrics["gaussian"] == pytest.approx(metrics["full_gaussian"], abs=1e-3)
    assert KernelPrior.load(auto).family == description["family"]


def test_a_bank_includes_its_source_networks(command, in_world, auto, tmp_path):
    """A second prior of the same kernels has source networks for methods that start from them."""
    there, here = source(), source(auto)
    assert there.keys() == here.keys()
    assert all(torch.equal(w, here[name]) for name, w in there.items())
    out = tmp_path / "run"
    result = command("finetune", "--n", 2, "--init", "source", *TINY, "--prior-dir", auto, "--out", out)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("family", ["gaussian", "mixture", "flow"])
def test_every_family_is_fitted_and_used(command, in_world, tmp_path, family):
    """A family of `fit-prior` has a finite KL in `svi --prior`, and score-prior reads it."""
    prior, out = tmp_path / "prior", tmp_path / "run"
    result = command("fit-prior", "--kernels", BANK, "--family", family, "--density-steps", 5, "--out", prior)
    assert result.exit_code == 0, result.output
    assert json.loads((prior / "prior.json").read_text())["family"] == family
    result = command("svi", "--n", 2, *TINY, "--members", 1, "--prior", family, "--prior-dir", prior, "--out", out)
    assert result.exit_code == 0, result.output
    assert math.isfinite(last_metrics(out)["kl"])
    result = command("score-prior", prior, "--kernels", BANK, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["nats_per_kernel"]) == {
        "prior",
        "standard_normal",
        "isotropic",
        "full_gaussian",
    }


def test_a_merged_prior_is_used_without_a_source_network(command, in_world, tmp_path):
    sites = [tmp_path / name for name in ("oslo", "lima")]
    for site in sites:
        result = command("fit-prior", "--kernels", BANK, "--family", "gaussian", "--out", site)
        assert result.exit_code == 0, result.output
    merged, out = tmp_path / "merged", tmp_path / "run"
    result = command("merge-prior", sites[0], "--out", merged)
    assert result.exit_code == 2 and "give at least two priors" in result.output
    result = command("merge-prior", *sites, "--out", merged)
    assert result.exit_code == 0 and "oslo, lima" in result.output, result.output
    result = command("merge-prior", *sites, "--out", merged)
    assert result.exit_code == 2 and "--overwrite" in result.output
    settings = ("--prior", "gaussian", "--center", "none", "--prior-dir", merged, "--out", out)
    result = command("svi", "--n", 2, *TINY, "--members", 1, *settings)
    assert result.exit_code == 0, result.output
    assert math.isfinite(last_metrics(out)["kl"])


def test_the_bound_of_a_vae_can_be_tightened(command, in_world, tmp_path):
    settings = ("--prior", "dwp", "--particles", 3, "--train-reverse-model", "--center", "source", "--prior-scale", 0.5)
    result = command("svi", "--n", 2, *TINY, "--members", 1, *settings, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["gaussian", "isotropic"])
def test_a_simpler_prior_is_in_every_folder(command, in_world, tmp_path, name):
    result = command("svi", "--n", 2, *TINY, "--members", 1, "--prior", name, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["mixture", "flow"])
def test_a_family_that_the_folder_does_not_contain(command, in_world, tmp_path, name):
    result = command("svi", "--n", 2, *TINY, "--members", 1, "--prior", name, "--out", tmp_path / "run")
    assert result.exit_code == 2
    line = error_line(result.stderr)
    assert f"family 'dwp', not '{name}'" in line and f"fit a prior of the family '{name}'" in line
    assert not (tmp_path / "run").exists()


def test_a_member_that_has_not_learned_is_skipped(command, in_world, tmp_path, monkeypatch):
    """It is excluded from posterior and summary; the nulls are those of the first member that is kept."""
    scores = iter((0.1, 0.6))
    monkeypatch.setattr("dwp_pyro.training.target.validation_dice", lambda *args: next(scores))
    result = command("svi", "--n", 2, *TINY, "--members", 2, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "member 0: Dice 0.100 on validation cases, less than half of the best: skipped" in result.output
    assert not any(name.startswith("1.") for name in tensors(tmp_path / "run" / "posterior.safetensors"))
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert [member["dice"] for member in summary["members"]] == [0.6]
    assert summary["members"][0]["elbo"] == pytest.approx(summary["elbo"])
    rise = summary["elbo"] - summary["elbo_frozen"]
    assert summary["above_frozen"]["nats"] == pytest.approx(rise, abs=1)


def zero_step_svi(*options: object) -> tuple[object, ...]:
    """Return arguments for one step with learning rate 0."""
    return ("svi", "--n", 2, *TINY, "--members", 1, "--steps", 1, "--learning-rate", 0, "--anneal", 0, *options)


@pytest.mark.parametrize("name", ["dwp", "normal"])
def test_a_centered_prior_starts_at_the_source_kernels(command, in_world, tmp_path, name):
    """Initial means and deterministic weights are those of the source network."""
    result = command(*zero_step_svi("--prior", name, "--center", "source", "--out", tmp_path / "run"))
    assert result.exit_code == 0, result.output
    posterior = tensors(tmp_path / "run" / "posterior.safetensors")
    for site, w in source().items():
        kind = "loc" if w.shape[2:] == (3, 3, 3) else "network"
        assert torch.equal(posterior[f"0.{kind}.{site}"], w), site


def test_a_centered_normal_prior_has_the_kl_of_its_formula(command, in_world, tmp_path):
    """KL from N(source, s²) to N(source, c²): log(c/s) + s²/2c² − ½ per weight, s 1 % of the RMS of the site."""
    divergences = []
    for i, options in enumerate((("--center", "source"), ("--init", "source"))):
        out = tmp_path / f"run{i}"
        settings = ("--prior", "normal", "--prior-scale", 0.5, "--init-scale", 0.01, *options, "--out", out)
        result = command(*zero_step_svi(*settings))
        assert result.exit_code == 0, result.output
        divergences.append(last_metrics(out)["kl"])
    kernels = [w for w in source().values() if w.shape[2:] == (3, 3, 3)]
    ratios = [(w.numel(), float(0.01 * w.square().mean().sqrt() / 0.5)) for w in kernels]
    spread = sum(count * (-math.log(ratio) + 0.5 * ratio**2 - 0.5) for count, ratio in ratios)
    assert divergences[0] == pytest.approx(spread, rel=1e-4)
    norm = sum(float(w.square().sum()) for w in kernels)
    assert divergences[1] == pytest.approx(spread + 0.5 * norm / 0.5**2, rel=1e-4)


def test_finetuning_can_start_from_prior_samples(command, in_world, tmp_path):
    """All kernels of the network follow an unusual prior, and all differ."""
    np.save(tmp_path / "k.npy", np.random.default_rng(0).normal(7, 0.1, size=(50, 3, 3, 3)))
    prior, out = tmp_path / "prior", tmp_path / "run"
    result = command("fit-prior", "--kernels", tmp_path / "k.npy", "--family", "gaussian", "--out", prior)
    assert result.exit_code == 0, result.output
    start = ("--init", "prior", "--prior-dir", prior, "--steps", 1, "--learning-rate", 0)
    result = command("finetune", "--n", 2, *TINY, *start, "--out", out)
    assert result.exit_code == 0, result.output
    for name, w in tensors(out / "posterior.safetensors").items():
        spatial = w.shape[2:] == (3, 3, 3)
        assert ((w - 7).abs() < 1).all() == spatial, name
        assert not spatial or len(w.flatten(0, 1).unique(dim=0)) == w.shape[:2].numel()


def test_l2_sp_keeps_the_weights_at_the_source(command, in_world, tmp_path):
    """A strong L2-SP penalty holds a network that diverges without it."""
    before, distances = source(), []
    for l2_sp_weight in (0, 1e8):
        out = tmp_path / f"run{l2_sp_weight:g}"
        settings = ("--init", "source", "--l2-sp", l2_sp_weight, "--steps", 20, "--learning-rate", 0.01)
        result = command("finetune", "--n", 2, *TINY, *settings, "--out", out)
        assert result.exit_code == 0, result.output
        after = network(out / "posterior.safetensors")
        distances.append(math.sqrt(sum(float((after[name] - w).square().sum()) for name, w in before.items())))
    assert distances[1] < 0.1 * distances[0]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("finetune", "--l2-sp", "1"), "l2-sp"),
        (("finetune", "--init", "prior", "--trainable", "first-last"), "train"),
        (("finetune", "--init", "prior", "--prior-dir", "data"), "data"),
        (("svi", "--prior", "log-uniform", "--center", "source"), "log-uniform"),
        (("svi", "--prior", "log-uniform", "--prior-scale", "2"), "log-uniform"),
        (("svi", "--prior", "normal", "--center", "source", "--prior-dir", "data"), "source.safetensors"),
        (("svi", "--prior-scale", "0"), "prior-scale"),
        (("svi", "--members", "2", "--steps", "1"), "2 members need as many steps"),
        (("svi", "--members", "0"), "members"),
    ],
)
def test_incompatible_settings(command, in_world, tmp_path, arguments, culprit):
    name, *rest = arguments
    result = command(name, "--n", 2, *TINY, *rest, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    line = error_line(result.stderr)
    assert culprit in line
    assert not (tmp_path / "run").exists()


def test_a_bank_is_not_replaced_by_its_own_prior(command, in_world):
    """Overwriting the folder of the bank would delete the bank first."""
    before = tensors(Path(BANK))
    result = command("fit-prior", "--kernels", BANK, "--out", "runs/prior-ms", "--overwrite")
    assert result.exit_code == 2, result.output
    assert "another --out" in result.output
    assert tensors(Path(BANK)).keys() == before.keys()


def test_the_bank_records_the_correlation_of_kernels_with_their_start(world):
    """A short training leaves kernels close to their start, a second cycle less so."""
    sources = json.loads((world.path / "runs/prior-ms/kernels.json").read_text())["sources"]
    correlations = [source["start_correlation"] for source in sources]
    assert all(0.3 < correlation < 1 for correlation in correlations)
    provenance = json.loads((world.path / "runs/prior-ms/prior.json").read_text())["provenance"]
    assert provenance["start_correlation"] == correlations


def test_the_table_of_source_networks_names_bootstraps(command, in_world, tmp_path):
    """The second of three networks has not learned and is not in the bank: rows are 0 and 2, two snapshots each."""
    for name in ("kernels.safetensors", "kernels.json"):
        (tmp_path / name).write_bytes((in_world / "runs/prior-ms" / name).read_bytes())
    bank = json.loads((tmp_path / "kernels.json").read_text())
    for source in bank["sources"]:
        source["bootstrap"] *= 2
    (tmp_path / "kernels.json").write_text(json.dumps(bank))
    settings = ("--kernels", tmp_path / "kernels.safetensors", "--family", "gaussian", "--out", tmp_path / "prior")
    result = command("fit-prior", *settings)
    assert result.exit_code == 0, result.output
    header, *rows = result.output[result.output.index("Source networks:") :].splitlines()[1:]
    assert header.split()[:3] == ["bootstrap", "snapshot", "Dice"]
    assert [row.split()[:2] for row in rows[:4]] == [["0", "0"], ["0", "1"], ["2", "0"], ["2", "1"]]


@pytest.mark.parametrize("command_line", [("svi", "--prior", "dwp"), ("finetune", "--init", "source")])
def test_each_member_starts_at_a_source_network_of_its_own(command, in_world, tmp_path, command_line):
    """The best bootstrap comes first; the second differs."""
    settings = ("--n", 2, *TINY, "--steps", 2, "--learning-rate", 0, "--members", 2, "--out", tmp_path / "run")
    result = command(*command_line, *settings)
    assert result.exit_code == 0, result.output
    posterior = tensors(tmp_path / "run" / "posterior.safetensors")
    for number in (0, 1):
        for site, w in source(number=number).items():
            kind = "loc" if f"0.loc.{site}" in posterior else "network"
            assert torch.equal(posterior[f"{number}.{kind}.{site}"], w), site
    assert not torch.equal(source(number=0)["input.weight"], source(number=1)["input.weight"])
    sources = json.loads(Path("runs/prior-ms/kernels.json").read_text())["sources"]
    best = max(sources, key=lambda source: source["dice"])
    snapshot = f"runs/prior-ms/source/bootstrap{best['bootstrap']}/snapshot{best['snapshot']}.safetensors"
    assert torch.equal(network(Path(snapshot))["input.weight"], source()["input.weight"])


def test_more_members_than_source_networks(command, in_world, tmp_path):
    result = command("svi", "--n", 2, *TINY, "--members", 3, "--out", tmp_path / "run")
    assert result.exit_code == 2
    line = error_line(result.stderr)
    assert "source.safetensors: holds 2 source networks" in line and "give at most 2 members" in line
    assert not (tmp_path / "run").exists()


def test_members_of_random_starts_differ(command, in_world, tmp_path):
    settings = ("--steps", 2, "--learning-rate", 0, "--members", 2, "--out", tmp_path / "run")
    result = command("finetune", "--n", 2, "--init", "random", *TINY, *settings)
    assert result.exit_code == 0, result.output
    one, two = (network(tmp_path / "run" / "posterior.safetensors", number) for number in (0, 1))
    assert one.keys() == two.keys()
    # Norms start with equal weights.
    assert not any(torch.equal(w, two[name]) for name, w in one.items() if w.dim() == 5)


def test_there_are_at_most_as_many_members_as_source_networks(command, copy_of_world):
    """The world has two source networks; the default is three members."""
    result = command("svi", "--n", 2, *TINY, "--out", "run")
    assert result.exit_code == 0, result.output
    assert len(Posterior.load(copy_of_world / "run" / "posterior.safetensors").members) == 2


def test_a_prior_of_two_data_sets(copy_of_world, command):
    """Cases of both are in the split, named after their set."""
    write_phantoms("ms", copy_of_world / "data" / "other", 2, shape=(28, 32, 28))
    sets = ("--root", "data/ms", "--root", "data/other")
    short = ("--bootstraps", "1", "--snapshots", "1", "--density-steps", "2")
    result = command("fit-prior", *sets, *TINY, *short, "--out", "prior")
    assert result.exit_code == 0, result.output
    roles = json.loads((copy_of_world / "prior/split.json").read_text())
    cases = [case for role in roles.values() for case in role]
    assert sum(case.startswith("ms-") for case in cases) == 6
    assert sum(case.startswith("other-") for case in cases) == 2
    settings = yaml.safe_load((copy_of_world / "prior/config.yaml").read_text())
    assert (settings["root"], settings["more_roots"]) == ("data/ms", ["data/other"])
    # The settings of the run repeat it.
    again = command("fit-prior", "--config", "prior/config.yaml", "--out", "again")
    assert again.exit_code == 0, again.output
    assert json.loads((copy_of_world / "again/split.json").read_text()) == roles
    # An option overrides all of them.
    one = command("fit-prior", "--config", "prior/config.yaml", "--root", "data/ms", "--out", "one")
    assert one.exit_code == 0, one.output
    assert yaml.safe_load((copy_of_world / "one/config.yaml").read_text())["more_roots"] is None
