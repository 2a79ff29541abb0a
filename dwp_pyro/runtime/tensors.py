"""Named tensors in safetensors files, with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dwp_pyro.runtime.errors import Diverged, RunError, UserError
from dwp_pyro.runtime.files import write_bytes

__all__ = ["fill_module", "load_tensors", "save_tensors"]

_CHECKSUM = "sha256"  # key in the metadata


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors and a JSON object to one safetensors file, atomically.

    The file has a checksum of both, because nothing else detects a flipped bit in a tensor.

    Raises:
        Diverged: if a tensor holds NaN or infinity; an existing file is kept.
    """
    if bad := _not_finite(tensors):
        raise Diverged(f"{path}: not written, because '{bad}' holds NaN or infinity")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    description = dict(metadata or {})
    # One entry: safetensors writes several header entries in random order, and equal content must give equal files.
    header = {"json": json.dumps(description | {_CHECKSUM: _digest(plain, description)})}
    write_bytes(path, safetensors.torch.save(plain, header))


def load_tensors(path: Path, error: type[UserError] = RunError) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON object of a safetensors file; check the checksum if there is one.

    Raises:
        UserError: of class `error`, if the file is missing or damaged or holds NaN or infinity.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not a JSON object")
        if _CHECKSUM in metadata and metadata.pop(_CHECKSUM) != _digest(tensors, metadata):
            raise ValueError("its checksum does not match; restore a copy or create it again")
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or 'no such file'})") from problem
    except (safetensors.SafetensorError, ValueError, RecursionError) as problem:
        raise error(f"{path}: is damaged or is not a safetensors file ({problem})") from problem
    if bad := _not_finite(tensors):
        raise error(f"{path}: tensor '{bad}' holds NaN or infinity; the file is damaged")
    return tensors, metadata


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that holds NaN or infinity; None if all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a module by the names of its state dict.

    Raises:
        ValueError: if names, shapes or dtypes differ from the module's.
    """
    for name, expected in module.state_dict().items():
        if name in tensors and tensors[name].dtype != expected.dtype:
            raise ValueError(f"'{name}' holds {tensors[name].dtype}, not {expected.dtype}")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as problem:
        raise ValueError(str(problem)) from problem


def _digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of names, dtypes, shapes, values and the description, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
