"""Named tensors on disk: safetensors, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dwp_pyro.errors import RunError, UserError
from dwp_pyro.storage import write_bytes

__all__ = ["load_tensors", "save_tensors"]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, and a JSON object with them, as one safetensors file, whole or not at all.

    Raises:
        RunError: if one holds NaN or infinity, which `load_tensors` would refuse; what was there stays.
    """
    if bad := _not_finite(tensors):
        raise RunError(
            f"{path}: is not written, for '{bad}' has become NaN or infinite; begin again with --overwrite and a lower "
            "--learning-rate or --weight-decay"
        )
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, {"json": json.dumps(metadata or {})}))


def load_tensors(path: Path, error: type[UserError] = RunError) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors by name, and the JSON object.

    Raises:
        UserError: of the class `error`, if the file is missing, damaged, or holds NaN or infinity.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or 'no such file'})") from problem
    except (safetensors.SafetensorError, ValueError) as problem:
        raise error(f"{path}: is damaged or is not a safetensors file ({problem})") from problem
    if bad := _not_finite(tensors):
        raise error(f"{path}: tensor '{bad}' holds NaN or infinity; the file is damaged")
    return tensors, metadata


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None
