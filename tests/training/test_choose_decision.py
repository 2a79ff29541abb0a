"""The decision that is best on validation cases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.training import choose_decision as module
from dwp_pyro.training.choose_decision import choose_decision, volume_lost

CONFIG = NetworkConfig(("flair",), ("whole",), ((1,),), "brats", None, (16, 16, 16))
FOCUS, SECOND = slice(2, 10), slice(14, 17)


def volume(*parts: tuple[slice, float]) -> np.ndarray:
    """Return slabs of given values, [1, 20, 4, 4]."""
    values = np.zeros((1, 20, 4, 4), np.float32)
    for part, value in parts:
        values[:, part] = value
    return values


@dataclass(frozen=True)
class Scan:
    label: MetaTensor
    image: MetaTensor
    brain_mask: MetaTensor
    id: str = ""
    patient: str = ""


def example(label: np.ndarray, probability: np.ndarray | None = None) -> Scan:
    parts = (label, label if probability is None else probability, np.ones_like(label))
    return Scan(*(MetaTensor(torch.from_numpy(part)) for part in parts))


@pytest.fixture
def posterior(monkeypatch) -> SimpleNamespace:
    """A posterior whose prediction is the image."""

    def predict(posterior, image, seeds, *, decision, advance):
        for _ in seeds:
            advance()
        assert len(seeds) == 2 * len(decision.flips)
        return SimpleNamespace(probability=image)

    monkeypatch.setattr(module, "posterior_predictive", predict)
    return SimpleNamespace(network_config=CONFIG, members=[None])


def choose(posterior, train, validation, mirror=()) -> Decision:
    train, validation = (
        [replace(case, id=f"{role}{number}") for number, case in enumerate(cases)]
        for role, cases in (("train", train), ("validation", validation))
    )
    patients = {case.id: case.patient or case.id for case in (*train, *validation)}
    data = SimpleNamespace(train=train, validation=validation, patients=patients)
    return choose_decision(posterior, data, mirror, torch.device("cpu"))


ONE = example(volume((FOCUS, 1)))
TWO = example(volume((FOCUS, 1), (SECOND, 1)))


def test_where_nothing_helps_nothing_is_done(posterior):
    perfect = example(volume((FOCUS, 1)), volume((FOCUS, 0.9)))
    assert choose(posterior, [ONE], [perfect]) == Decision()


def test_false_components_are_removed(posterior):
    wrong = example(volume((FOCUS, 1)), volume((FOCUS, 0.9), (SECOND, 0.8)))
    assert choose(posterior, [ONE], [wrong]) == Decision(min_mass=0.5)


def test_a_second_focus_in_the_training_labels_is_protected(posterior):
    """Even if validation favors the largest component: a second focus of 3/8 survives 1/4, not 1/2."""
    wrong = example(volume((FOCUS, 1)), volume((FOCUS, 0.9), (SECOND, 0.8)))
    labels = {"A1": ONE.label.numpy() > 0, "A2": ONE.label.numpy() > 0, "B": TWO.label.numpy() > 0}
    patients = {"A1": "A", "A2": "A", "B": "B"}
    assert volume_lost(labels, patients, 0.25) == 0
    assert volume_lost(labels, patients, 0.5) == pytest.approx(3 / 11 / 2)
    several = {"A": [ONE, TWO], "B": [TWO, ONE]}
    labels = {case: np.concatenate([each.label for each in regions]) > 0 for case, regions in several.items()}
    assert volume_lost(labels, {"A": "A", "B": "B"}, 0.5) == pytest.approx(3 / 11), "the worst region of a case counts"
    assert choose(posterior, [ONE, TWO], [wrong]).min_mass <= 0.25


def test_probabilities_that_are_too_low_get_a_lower_threshold(posterior):
    timid = example(volume((FOCUS, 1)), volume((FOCUS, 0.45)))
    assert choose(posterior, [ONE], [timid]) == Decision("expected-dice")


def test_one_half_must_be_better_by_more_than_the_noise(posterior):
    """With half of a timid case lost and a doubtful component added, both thresholds are as good on average."""
    timid = example(volume((slice(2, 10), 1)), volume((slice(2, 6), 0.9), (slice(6, 10), 0.45)))
    rash = example(volume((slice(2, 6), 1)), volume((slice(2, 6), 0.9), (slice(6, 9), 0.45)))
    assert choose(posterior, [ONE], [timid, rash, rash]).threshold == "expected-dice"
    assert choose(posterior, [ONE], [rash, rash, rash]).threshold == "half"
    visits = [replace(rash, patient="A")] * 6
    assert choose(posterior, [ONE], [timid, *visits]).threshold == "expected-dice", "visits count as one patient"
    assert choose(posterior, [ONE], [rash]).threshold == "half", "one patient gains more than patients differ"
    hasty = example(volume((slice(2, 8), 1)), volume((slice(2, 8), 0.9), (slice(8, 9), 0.48)))
    assert choose(posterior, [ONE], [hasty]).threshold == "expected-dice", "one patient gains less"


def test_mirrored_passes_are_chosen_where_they_help(posterior, monkeypatch):
    right = volume((FOCUS, 0.9))

    def predict(posterior, image, seeds, *, decision, advance):
        return SimpleNamespace(probability=torch.from_numpy(right) if decision.mirror else torch.zeros(1, 20, 4, 4))

    monkeypatch.setattr(module, "posterior_predictive", predict)
    assert choose(posterior, [ONE], [ONE], ("x",)) == Decision(mirror=("x",))
    assert choose(posterior, [ONE], [ONE], ("none",)).mirror == ()


def test_mirrored_passes_are_compared_with_as_many_others(posterior, monkeypatch):
    counts = []

    def predict(posterior, image, seeds, *, decision, advance):
        counts.append((len(decision.flips), len(seeds)))
        return SimpleNamespace(probability=torch.zeros(1, 20, 4, 4))

    monkeypatch.setattr(module, "posterior_predictive", predict)
    choose(posterior, [ONE], [ONE], ("x", "y", "z"))
    assert counts == [(1, 8), (8, 8)]


def test_without_validation_cases_the_labels_decide(posterior):
    assert choose(posterior, [ONE], []) == Decision(min_mass=0.25)
    small = example(volume((FOCUS, 1), (slice(14, 15), 1)))
    assert choose(posterior, [small], []) == Decision(min_mass=0.1)
