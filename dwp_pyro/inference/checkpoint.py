"""Checkpoints of a training: parameters, state of the optimizer, position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwp_pyro.errors import RunError
from dwp_pyro.inference.finite_steps import FiniteSteps
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = ["load_checkpoint", "save_checkpoint", "steps_reported"]

_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW, for each parameter that has had a gradient


def save_checkpoint(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    steps: FiniteSteps,
    unreported: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint. Everything random, and every rate, is a function of the step.

    Args:
        path: File to write.
        step: Steps done.
        parameters: Name → parameter.
        steps: Optimizer and its counts.
        unreported: Metrics of the last step, if they have not been reported.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter
        state = steps.optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    save_tensors(path, tensors, {"step": step, "unreported": unreported, **steps.counts()})


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], steps: FiniteSteps
) -> tuple[int, Mapping[str, float] | None]:
    """Restore a checkpoint, if there is one; returns the steps done and the metrics that are still to be reported.

    Raises:
        RunError: if it does not fit the parameters.
    """
    if not path.exists():
        return 0, None
    tensors, metadata = load_tensors(path)
    if {name for name in tensors if name.startswith("value/")} != {f"value/{name}" for name in parameters}:
        raise RunError(f"{path}: is a checkpoint of another network; give --overwrite to start again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            of = {key.removesuffix(f"/{name}"): tensor for key, tensor in tensors.items() if key.endswith(f"/{name}")}
            if of.keys() - {"value"} not in (set(), _STATE) or any(
                tensor.shape != (() if key == "step" else parameter.shape)
                or tensor.dtype != (torch.float32 if key == "step" else parameter.dtype)
                for key, tensor in of.items()
            ):
                raise RunError(f"{path}: '{name}' has another shape or format; give --overwrite to start again")
            parameter.copy_(of.pop("value"))
            steps.optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in of.items()}
    unreported = metadata.get("unreported")
    counts = [metadata.get(name, 0) for name in steps.counts()]
    if not all(isinstance(count, int) for count in counts) or not isinstance(unreported, dict | None):
        raise RunError(f"{path}: is not a checkpoint; give --overwrite to start again")
    steps.count_on_from(metadata)
    return _steps(path, metadata), unreported


def steps_reported(path: Path) -> int:
    """Steps behind a checkpoint whose metrics need not be logged again; 0 if there is none.

    Raises:
        RunError: if the file is no checkpoint.
    """
    if not path.exists():
        return 0
    _, metadata = load_tensors(path)
    return _steps(path, metadata) - (metadata.get("unreported") is not None)


def _steps(path: Path, metadata: Mapping[str, Any]) -> int:
    step = metadata.get("step")
    if not isinstance(step, int) or step < 0:
        raise RunError(f"{path}: is not a checkpoint; give --overwrite to start again")
    return step
