"""Bootstraps of patients, and networks that have not learned."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dwp_pyro.config import FitPriorConfig
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.pipeline import train_network
from dwp_pyro.pipeline import train_source as module
from dwp_pyro.pipeline.train_network import have_learned
from dwp_pyro.pipeline.train_source import train_source

CARD = NetworkCard(("flair",), ("lesion",), ((1,),), "openms", None, (16, 16, 16), widths=(2, 2, 3, 3))


def test_patients_are_drawn_not_scans():
    """Five patients, one of three visits: five scans, of that patient no more than of others; its visits take turns."""
    patients = {"a1": "a", "a2": "a", "a3": "a", "b": "b", "c": "c", "d": "d", "e": "e"}
    data = SimpleNamespace(train=[SimpleNamespace(id=name) for name in patients], patients=patients)
    of_a, draws = 0, 400
    for seed in range(draws):
        drawn = Counter(example.id for example in module._bag(data, np.random.default_rng(seed)))
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
        ([0.02, 0.0, 0.05], [True, True, True]),  # all have failed
        ([None, None], [True, True]),
        ([0.4], [True]),
        ([], []),
    ],
)
def test_half_of_the_best_is_asked_for(dice, expected):
    assert have_learned(dice) == expected


@pytest.mark.parametrize(
    ("truth", "predicted", "dice"),
    [
        # One case of two regions, with and without voxels; then one without either.
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 0), (0, 0, 0, 0)), 0.0),
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((1, 1, 0, 0), (1, 1, 1, 1)), 1.0),
        (((0, 0, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 0), (1, 0, 0, 0)), 0.75),
    ],
)
def test_a_region_that_a_case_lacks_is_skipped(monkeypatch, truth, predicted, dice):
    """So a dead network has a Dice of 0; without any region in any case it counts whether nothing is predicted."""

    def example(label, probability) -> SimpleNamespace:
        volume = [torch.tensor(each, dtype=torch.float)[..., None, None] for each in (label, probability)]
        parts = {"label": volume[0], "image": volume[1], "brain": torch.ones(1, 4, 1, 1)}
        return SimpleNamespace(**{name: SimpleNamespace(as_tensor=lambda x=x: x) for name, x in parts.items()})

    nothing = ((0, 0, 0, 0), (0, 0, 0, 0))
    data = SimpleNamespace(validation=(example(truth, predicted), example(nothing, nothing)))
    # What the network gives is what stands in the place of the image.
    monkeypatch.setattr(train_network, "posterior_mean_probability", lambda posterior, image: image)
    posterior = SimpleNamespace(card=SimpleNamespace(activation="sigmoid"))
    found = train_network.validation_dice(posterior, data, torch.device("cpu"))
    assert found == pytest.approx(dice)


def test_a_network_that_has_not_learned_is_in_neither_bank_nor_members(tmp_path, monkeypatch, capsys):
    """Three bootstraps, the second dead; its snapshots stay on disk, and a line names it."""
    dices = {0: (0.3, 0.5), 1: (0.0, 0.02), 2: (0.6, 0.4)}

    def trained(config, data, run, folder: Path, bootstrap: int, device, track) -> None:
        for number, dice in enumerate(dices[bootstrap]):
            torch.manual_seed(10 * bootstrap + number)
            Posterior(CARD, [Member(CARD.build(), None)]).save(folder / f"snapshot{number}.safetensors")
            (folder / f"snapshot{number}.json").write_text(json.dumps({"dice": dice, "start_correlation": 0.5}))

    monkeypatch.setattr(module, "_train_bootstrap", trained)
    config = dataclasses.replace(FitPriorConfig(), bootstraps=3, snapshots=2)
    data = SimpleNamespace(layout="openms")
    snapshots, sources = train_source(config, data, tmp_path, torch.device("cpu"), lambda *args: None)
    assert [(source.bootstrap, source.snapshot, source.dice) for source, _ in snapshots] == [
        (0, 0, 0.3), (0, 1, 0.5), (2, 0, 0.6), (2, 1, 0.4)
    ]  # fmt: skip
    best = [Posterior.load(tmp_path / f"source/bootstrap{b}/snapshot{s}.safetensors") for b, s in ((2, 0), (0, 1))]
    assert len(sources.members) == 2
    for found, expected in zip(sources.members, best, strict=True):
        weight = found.network.get_parameter("input.weight")
        assert torch.equal(weight, expected.members[0].network.get_parameter("input.weight"))
    said = "".join(capsys.readouterr())
    assert "bootstrap 1: Dice 0.020 on validation cases, less than half of the best: left out" in said
    assert "bootstrap 2: Dice 0.600 on validation cases\n" in said
