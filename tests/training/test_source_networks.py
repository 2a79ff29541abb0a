"""Bootstraps of patients, networks that have not learned, and source networks for more regions."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor
from torch.testing import assert_close

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import FitPriorConfig
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.models.likelihoods import region_probability
from dwp_pyro.models.registry import NETWORKS
from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import write_bytes
from dwp_pyro.training import network_training
from dwp_pyro.training import source_networks as module
from dwp_pyro.training.network_training import have_learned
from dwp_pyro.training.source_networks import bootstrap_cases, load_source_network, train_source

NETWORK = NetworkConfig(("flair",), ("lesion",), ((1,),), "openms", None, (16, 16, 16), widths=(2, 2, 3, 3))
THREE = {"regions": ("whole", "core", "enhancing"), "values": ((1, 2, 4), (1, 4), (4,)), "layout": "brats"}


def test_bootstraps_draw_patients_not_scans():
    """Five patients, one with three scans: five draws; repeated draws of a patient cycle through its scans."""
    patients = {"a1": "a", "a2": "a", "a3": "a", "b": "b", "c": "c", "d": "d", "e": "e"}
    data = SimpleNamespace(train=[SimpleNamespace(id=name) for name in patients], patients=patients)
    of_a, draws = 0, 400
    for bootstrap in range(draws):
        drawn = Counter(example.id for example in bootstrap_cases(data, 0, bootstrap))
        assert drawn.total() == 5
        assert 0 <= drawn["a1"] - drawn["a3"] <= 1 and drawn["a1"] >= drawn["a2"] >= drawn["a3"]
        of_a += drawn["a1"] + drawn["a2"] + drawn["a3"]
    # One of five on average; within four standard errors.
    assert abs(of_a / draws - 1) < 4 * (5 * 0.2 * 0.8 / draws) ** 0.5


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.6, 0.0, 0.5], [True, False, True]),
        ([0.6, 0.31, 0.5], [True, True, True]),
        ([0.0, 0.0, 0.6], [False, False, True]),
        ([0.6, 0.1], [True, False]),
        ([0.02, 0.0, 0.05], [True, True, True]),  # all failed
        ([None, None], [True, True]),
        ([0.4], [True]),
        ([], []),
    ],
)
def test_learned_networks_have_half_of_the_best_dice(dice, expected):
    assert have_learned("member", dice) == expected


@pytest.mark.parametrize(
    ("truth", "predicted", "dice"),
    [
        # One case with two regions, with and without voxels; then one without voxels in either.
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 0), (0, 0, 0, 0)), 0.0),
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((1, 1, 0, 0), (1, 1, 1, 1)), 1.0),
        (((0, 0, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 0), (1, 0, 0, 0)), 0.75),
    ],
)
def test_a_region_that_a_case_lacks_is_skipped(monkeypatch, truth, predicted, dice):
    """An empty prediction scores 0; if every case lacks every region, it scores 1."""

    def example(label, probability) -> SimpleNamespace:
        volume = [torch.tensor(each, dtype=torch.float)[..., None, None] for each in (label, probability)]
        parts = {"label": volume[0], "image": volume[1], "brain_mask": torch.ones(1, 4, 1, 1)}
        return SimpleNamespace(**{name: MetaTensor(x) for name, x in parts.items()})

    nothing = ((0, 0, 0, 0), (0, 0, 0, 0))
    data = SimpleNamespace(validation=(example(truth, predicted), example(nothing, nothing)))
    # The image of each example holds the prediction.
    monkeypatch.setattr(network_training, "posterior_mean_probability", lambda posterior, image: image)
    posterior = SimpleNamespace(network_config=SimpleNamespace(activation="sigmoid"))
    found = network_training.validation_dice(posterior, data, torch.device("cpu"))
    assert found == pytest.approx(dice)


def test_label_voxels_outside_of_the_brain_do_not_count(monkeypatch):
    label, brain = torch.tensor([[1, 1, 1, 0.0]])[..., None, None], torch.tensor([[1, 1, 0, 1.0]])[..., None, None]
    parts = {"label": label, "image": label * brain, "brain_mask": brain}
    data = SimpleNamespace(validation=(SimpleNamespace(**{name: MetaTensor(x) for name, x in parts.items()}),))
    monkeypatch.setattr(network_training, "posterior_mean_probability", lambda posterior, image: image)
    posterior = SimpleNamespace(network_config=SimpleNamespace(activation="sigmoid"))
    assert network_training.validation_dice(posterior, data, torch.device("cpu")) == 1


def test_a_network_that_has_not_learned_is_in_neither_bank_nor_members(tmp_path, monkeypatch, caplog):
    """The second of three bootstraps has not learned; a log line names it."""
    dices = {0: (0.3, 0.5), 1: (0.0, 0.02), 2: (0.6, 0.4)}

    def trained(config, data, run: Path, stage: str, device, track) -> None:
        folder, bootstrap = run / "source" / stage, int(stage[-1])
        for name in ("checkpoint.safetensors", ".tmp-0123abcd-checkpoint.safetensors"):  # the second of a killed write
            write_bytes(folder / name, b"")
        for number, dice in enumerate(dices[bootstrap]):
            torch.manual_seed(10 * bootstrap + number)
            Posterior(NETWORK, [Member(NETWORK.build(), None)]).save(folder / f"snapshot{number}.safetensors")
            (folder / f"snapshot{number}.json").write_text(json.dumps({"dice": dice, "start_correlation": 0.5}))

    monkeypatch.setattr(module, "_train_bootstrap", trained)
    caplog.set_level(logging.INFO, "dwp_pyro")
    config = dataclasses.replace(FitPriorConfig(), bootstraps=3, snapshots=2)
    data = SimpleNamespace(layout="openms")
    snapshots, sources = train_source(config, data, RunOptions(tmp_path), lambda *args: None)
    assert [(source.bootstrap, source.snapshot, source.dice) for source, _ in snapshots] == [
        (0, 0, 0.3), (0, 1, 0.5), (2, 0, 0.6), (2, 1, 0.4)
    ]  # fmt: skip
    best = [Posterior.load(tmp_path / f"source/bootstrap{b}/snapshot{s}.safetensors") for b, s in ((2, 0), (0, 1))]
    assert len(sources.members) == 2
    for found, expected in zip(sources.members, best, strict=True):
        weight = found.network.get_parameter("input.weight")
        assert torch.equal(weight, expected.members[0].network.get_parameter("input.weight"))
    assert not list(tmp_path.rglob("*checkpoint*"))
    assert "bootstrap 1: Dice 0.020 on validation cases, less than half of the best: skipped" in caplog.text
    assert "bootstrap 2: Dice 0.600 on validation cases\n" in caplog.text
    private = dataclasses.replace(config, family="gaussian", epsilon=1.0)
    snapshots, sources = train_source(private, data, RunOptions(tmp_path), lambda *args: None)
    assert (len(snapshots), len(sources.members)) == (6, 2), "one network's Dice must not remove another's kernels"


@pytest.mark.parametrize("name", NETWORKS)
def test_each_region_starts_from_the_region_of_the_source(tmp_path, name):
    network_config = dataclasses.replace(NETWORK, network=name, patch=(32, 32, 32), widths=(8, 16, 32, 64))
    network = network_config.build()
    torch.nn.init.normal_(list(network.parameters())[-1])
    Posterior(network_config, [Member(network, None)]).save(tmp_path / "source.safetensors")
    loaded = load_source_network(tmp_path, dataclasses.replace(network_config, **THREE), 0)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        one = region_probability(network(image), "sigmoid")
        several = region_probability(loaded(image), "sigmoid")
        assert_close(several, one.expand(-1, 3, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert one.std() > 1e-3
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_source_of_several_regions_is_no_start_for_another_number(tmp_path):
    network_config = dataclasses.replace(NETWORK, **THREE)
    Posterior(network_config, [Member(network_config.build(), None)]).save(tmp_path / "source.safetensors")
    with pytest.raises(RunError, match="segments 3 regions, the target 1"):
        load_source_network(tmp_path, NETWORK, 0)


def test_the_regions_of_a_source_in_another_order_are_no_start(tmp_path):
    """Their rows of the output layer would be swapped."""
    network_config = dataclasses.replace(NETWORK, **THREE)
    Posterior(network_config, [Member(network_config.build(), None)]).save(tmp_path / "source.safetensors")
    for regions in (("whole", "core", "enhancing"), ("oedema", "necrosis", "cyst")):
        load_source_network(tmp_path, dataclasses.replace(network_config, regions=regions), 0)
    with pytest.raises(RunError, match="segments whole, core, enhancing, the target core, whole, enhancing; give"):
        load_source_network(tmp_path, dataclasses.replace(network_config, regions=("core", "whole", "enhancing")), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_further_modalities_start_at_zero(tmp_path, name):
    """The target gives what the source network gives for its modality, whatever the others hold."""
    network_config = dataclasses.replace(NETWORK, network=name, patch=(32, 32, 32), widths=(8, 16, 32, 64))
    network = network_config.build()
    Posterior(network_config, [Member(network, None)]).save(tmp_path / "source.safetensors")
    target = dataclasses.replace(network_config, modalities=("t1", "flair", "t1ce"))
    loaded = load_source_network(tmp_path, target, 0)
    image = torch.randn(1, 3, 32, 32, 32)
    with torch.no_grad():
        assert_close(loaded(image), network(image[:, 1:2]), atol=1e-4, rtol=1e-4)


def test_a_source_with_other_modalities_is_no_start(tmp_path):
    Posterior(NETWORK, [Member(NETWORK.build(), None)]).save(tmp_path / "source.safetensors")
    target = dataclasses.replace(NETWORK, modalities=("t1", "t2"))
    with pytest.raises(RunError, match=r"has modalities \('flair',\), the target \('t1', 't2'\)"):
        load_source_network(tmp_path, target, 0)
