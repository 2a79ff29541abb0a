"""Which device to compute on."""

from __future__ import annotations

import torch

from dwp_pyro.errors import ConfigError

__all__ = ["torch_device"]


def torch_device(name: str) -> torch.device:
    """ "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1" → device.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ConfigError(f"device: '{name}' cannot be used here; choose auto, cpu or cuda") from problem
    return device
