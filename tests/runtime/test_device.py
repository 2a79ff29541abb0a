"""Devices by name, emulated precision, out-of-memory errors."""

import numpy as np
import pytest
import torch

from dwp_pyro.runtime import device
from dwp_pyro.runtime.errors import ConfigError, OutOfMemory


def test_devices_by_name():
    assert device.torch_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'nonsense' cannot be used"):
        device.torch_device("nonsense")
    with pytest.raises(ConfigError, match="'meta' is not supported"):
        device.torch_device("meta")


@pytest.mark.parametrize(
    ("precision", "supported", "warns"), [("bf16", False, True), ("bf16", True, False), ("float32", False, False)]
)
def test_emulation_is_logged(monkeypatch, caplog, precision, supported, warns):
    monkeypatch.setattr(device, "has_bfloat16", lambda device: supported)
    device.warn_if_emulated(precision, torch.device("cpu"))
    assert ("emulates" in caplog.text) is warns


@pytest.mark.parametrize("message", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", None])
def test_out_of_memory_is_detected_even_if_it_also_breaks_a_graph_capture(message):
    def fail():
        try:
            raise RuntimeError(message or "an illegal memory access")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    error = (OutOfMemory, "a run: the device ran out of memory") if message else (RuntimeError, "capture")
    with pytest.raises(error[0], match=error[1]), device.catch_out_of_memory("a run"):
        fail()


def test_numpy_out_of_memory_is_detected():
    with pytest.raises(OutOfMemory, match="a case: the device ran out of memory"), device.catch_out_of_memory("a case"):
        np.empty(2**60, np.uint8)
