"""Devices by name, and what they are slow at."""

import pytest
import torch

from dwp_pyro.errors import ConfigError, RunError
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


@pytest.mark.parametrize("said", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", None])
def test_want_of_memory_is_told_of_also_where_the_end_of_a_recording_fails_too(said):
    def fail():
        try:
            raise RuntimeError(said or "an illegal memory access")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    error = pytest.raises(RunError if said else RuntimeError, match="try less" if said else "capture")
    with error, device.within_memory("a run", "try less"):
        fail()
