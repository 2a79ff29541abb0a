"""Devices by name, and what they are slow at."""

import pytest
import torch

from dwp_pyro.errors import ConfigError
from dwp_pyro.inference import device


def test_devices_by_name():
    assert device.torch_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'nonsense' cannot be used"):
        device.torch_device("nonsense")


@pytest.mark.parametrize(
    ("precision", "has", "said"), [("bf16", False, True), ("bf16", True, False), ("float32", False, False)]
)
def test_emulation_is_said(monkeypatch, capsys, precision, has, said):
    monkeypatch.setattr(device, "has_bfloat16", lambda device: has)
    device.warn_of_emulation(precision, torch.device("cpu"))
    assert ("emulates" in capsys.readouterr().out) is said
