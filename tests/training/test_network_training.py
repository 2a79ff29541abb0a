"""Settings that reach the training loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwp_pyro.config.training import FitPriorConfig, SviConfig, TrainingConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.inference.schedule import TrainingSchedule
from dwp_pyro.training import network_training
from dwp_pyro.training.metrics_log import no_track
from dwp_pyro.training.network_training import TrainingSetup, network_config_for, train_network
from dwp_pyro.training.training_data import load_training_data, resolve


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that returns the model, the patches and the batch size that a training hands to its loop."""
    write_phantoms("ms", tmp_path / "ms", 4, shape=(20, 24, 20))
    handed: dict[str, Any] = {}

    def record(model, guide, patches, batch_size, *rest, **options):
        handed.update(model=model, patches=patches, batch_size=batch_size)

    monkeypatch.setattr(network_training, "fit", record)

    def train(kind: type[TrainingConfig], **chosen: object) -> dict[str, Any]:
        listed = {"root": str(tmp_path / "ms"), "patch": 16, "spacing": 4.0, "validation": 1, "widths": (2, 2, 3, 3)}
        settings = resolve(kind(**listed, **chosen), 1)
        data = load_training_data(settings, 1)
        train_network(
            TrainingSetup(network_config_for(settings, data).build()),
            data=data, settings=settings, schedule=TrainingSchedule(5, lambda step: 0.1, seed=3), run=tmp_path / "run",
            checkpoint=tmp_path / "checkpoint", device=torch.device("cpu"), stage="stage", track=no_track,
        )  # fmt: skip
        return handed

    (tmp_path / "run").mkdir()
    return train


def test_the_settings_of_the_model_and_the_batch(trained):
    handed = trained(SviConfig, n=1, likelihood="categorical", batch_size=3, precision="bf16")
    model = handed["model"]
    assert (model.likelihood, model.precision, handed["batch_size"]) == ("categorical", "bf16", 3)
    assert trained(SviConfig, n=1, dice_weight=0.75)["model"].log_likelihood.keywords["dice_weight"] == 0.75


def test_the_settings_of_the_patches(trained, monkeypatch):
    monkeypatch.setattr(network_training, "PatchDataset", lambda *arguments: arguments[1:])
    chosen = {"batch_size": 3, "mirror": ("y", "z"), "modality_dropout": 0.3, "randomize": True}
    assert trained(FitPriorConfig, **chosen)["patches"] == ((16, 16, 16), 3, 5 * 3, 0.3, ["y", "z"], True)
    assert trained(SviConfig, n=1, mirror=("none",))["patches"] == ((16, 16, 16), 3, 5, 0.0, [], False)
