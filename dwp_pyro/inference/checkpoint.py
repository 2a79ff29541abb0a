"""Checkpoints of a training: parameters, optimizer state and step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwp_pyro.runtime.errors import RunOutdated
from dwp_pyro.runtime.non_finite_guard import NonFiniteGuard
from dwp_pyro.runtime.tensors import load_tensors, save_tensors

__all__ = ["load_checkpoint", "save_checkpoint", "steps_reported"]

#: AdamW's state of each parameter that has had a gradient.
_STATE = {"step", "exp_avg", "exp_avg_sq"}


def save_checkpoint(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    guard: NonFiniteGuard,
    unreported: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint of `step` finished steps, with the metrics of the last one if they are unreported.

    Random draws and learning rates are functions of the step and are not saved.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter
        state = guard.optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    save_tensors(path, tensors, {"step": step, "unreported": unreported, **guard.state_dict()})


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], guard: NonFiniteGuard
) -> tuple[int, Mapping[str, float] | None]:
    """Restore parameters, optimizer and its counts from a checkpoint, if there is one, in place.

    Returns:
        Number of finished steps (0 without a checkpoint), and the metrics that are still to be reported.

    Raises:
        RunError: if the checkpoint does not fit the parameters.
    """
    if not path.exists():
        return 0, None
    tensors, metadata = load_tensors(path)
    if {name for name in tensors if name.startswith("value/")} != {f"value/{name}" for name in parameters}:
        raise RunOutdated(f"{path}: is a checkpoint of another network")
    with torch.no_grad():
        for name, parameter in parameters.items():
            saved = {
                key.removesuffix(f"/{name}"): tensor for key, tensor in tensors.items() if key.endswith(f"/{name}")
            }
            if saved.keys() - {"value"} not in (set(), _STATE) or any(
                tensor.shape != (() if key == "step" else parameter.shape)
                or tensor.dtype != (torch.float32 if key == "step" else parameter.dtype)
                for key, tensor in saved.items()
            ):
                raise RunOutdated(f"{path}: '{name}' has another shape or format")
            parameter.copy_(saved.pop("value"))
            guard.optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in saved.items()}
    unreported = metadata.get("unreported")
    counts = [metadata.get(name, 0) for name in guard.state_dict()]
    if not all(isinstance(count, int) for count in counts) or not isinstance(unreported, dict | None):
        raise RunOutdated(f"{path}: is not a checkpoint")
    guard.load_state_dict(metadata)
    return _step(path, metadata), unreported


def steps_reported(path: Path) -> int:
    """Return the number of steps of a checkpoint whose metrics have been reported; 0 without a checkpoint.

    Raises:
        RunError: if the file is not a checkpoint.
    """
    if not path.exists():
        return 0
    _, metadata = load_tensors(path)
    return _step(path, metadata) - (metadata.get("unreported") is not None)


def _step(path: Path, metadata: Mapping[str, Any]) -> int:
    step = metadata.get("step")
    if not isinstance(step, int) or step < 0:
        raise RunOutdated(f"{path}: is not a checkpoint")
    return step
