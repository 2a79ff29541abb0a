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
    """Write named tensors, and a JSON object with them, as one safetensors file, whole or not at all."""
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
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise error(f"{path}: tensor '{name}' holds NaN or infinity; the file is damaged")
    return tensors, metadata
