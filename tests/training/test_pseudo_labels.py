"""Labels of unlabelled scans: certain voxels alone, and half of the patches from labeled cases."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from dwp_pyro.data.preprocessing import Example, class_indices
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.training import choose_decision as module
from dwp_pyro.training import target
from dwp_pyro.training.pseudo_labels import pseudo_label, with_pseudo_labels
from dwp_pyro.training.training_data import TrainingData

CONFIG = NetworkConfig(("flair",), ("whole",), ((1,),), "brats", None, (16, 16, 16))
CPU = torch.device("cpu")


@pytest.fixture
def posterior(monkeypatch) -> SimpleNamespace:
    """A posterior whose prediction is the image, with a decision that keeps the largest component."""
    monkeypatch.setattr(
        module, "posterior_predictive", lambda p, image, seeds, **given: SimpleNamespace(probability=image)
    )
    return SimpleNamespace(network_config=CONFIG, members=[None], decision=Decision(min_mass=1.0))


def example(name: str, values: list[float], brain: list[int] | None = None) -> Example:
    image = torch.tensor(values)[None, :, None, None].expand(1, -1, 3, 3).clone()
    mask = torch.tensor(brain or [1] * len(values), dtype=torch.uint8)[None, :, None, None].expand(1, -1, 3, 3).clone()
    return Example(name, MetaTensor(image), MetaTensor(mask), None, ())


def slab(volume: MetaTensor) -> list[int]:
    return volume.numpy()[0, :, 0, 0].astype(int).tolist()


def test_certain_voxels_are_labeled_and_the_rest_ignored(posterior):
    """0.79 and 0.21 have more than 0.5 nats, 0.81 and 0.19 less; the second component is background."""
    found = pseudo_label(posterior, example("u", [0.95, 0.81, 0.79, 0.21, 0.19, 0.0, 0.9, 0.0]), CPU)
    assert slab(found.label) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert slab(found.brain_mask) == [1, 1, 2, 2, 1, 1, 1, 1]
    assert [len(voxels) for voxels in found.indices] == [9 * 6, 9 * 2]


def test_voxels_outside_of_the_brain_and_ignored_ones_stay(posterior):
    found = pseudo_label(posterior, example("u", [0.9, 0.9, 0.9, 0.5], [0, 2, 1, 0]), CPU)
    assert slab(found.brain_mask) == [0, 2, 1, 0]
    assert slab(found.label) == [0, 0, 1, 0]


def test_voxels_that_mask_and_probability_dispute_are_ignored(posterior):
    """A threshold below 0.2 segments voxels that the network is certain are background."""
    posterior.decision = Decision("expected-dice")
    found = pseudo_label(posterior, example("u", [0.15] * 4 + [0.0] * 4), CPU)
    assert slab(found.label) == [0] * 8
    assert slab(found.brain_mask) == [2] * 4 + [1] * 4


def test_half_of_the_cases_are_labeled_ones(posterior):
    label = MetaTensor(torch.ones(1, 2, 3, 3, dtype=torch.uint8))
    one = example("a", [1.0, 1.0])
    labeled = [Example(name, one.image, one.brain_mask, label, class_indices(label, one.brain_mask)) for name in "ab"]
    data = TrainingData("brats", {}, None, tuple(labeled), (), (16, 16, 16), {}, ())
    both = with_pseudo_labels(data, [example(f"u{n}", [0.9, 0.0]) for n in range(5)], posterior, CPU)
    assert [each.id for each in both.train] == ["a", "b", "a", "b", "u0", "u1", "u2", "u3", "u4"]
    assert all(np.array_equal(slab(each.label), [1, 0]) for each in both.train[4:])


def test_a_student_counts_a_labeled_case_once_and_an_unlabelled_one_as_a_repetition(monkeypatch, tmp_path):
    """Two labeled cases, three times each beside six unlabelled ones: a repetition counts as a third of a case."""
    monkeypatch.setattr(target.Posterior, "load", lambda path: SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(target, "with_pseudo_labels", lambda data, *_: SimpleNamespace(train=data.train * 3 + (0,) * 6))
    data = SimpleNamespace(train=(1, 2))
    trainer = target._Trainer(None, data, CPU, tmp_path, None, "svi", 50_000.0)
    student = trainer.student([0] * 6)
    assert (student.name, student.evidence) == ("svi-student", pytest.approx(50_000 / 3))
