"""Named tensors on disk: safetensors, never a pickle."""

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

from dwp_pyro.errors import RunError, UserError
from dwp_pyro.storage import write_bytes

__all__ = ["fill_module", "load_tensors", "save_tensors"]

_CHECKSUM = "sha256"  # its name in the description


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, and a JSON object with them, as one safetensors file, whole or not at all.

    With the object is kept a checksum of both: a bit that flips in a number leaves a number, which nothing else tells.

    Raises:
        RunError: if one holds NaN or infinity, which `load_tensors` would refuse; what was there stays.
    """
    if bad := _not_finite(tensors):
        raise RunError(
            f"{path}: is not written, for '{bad}' has become NaN or infinite; begin again with --overwrite and a lower "
            "--learning-rate or --weight-decay"
        )
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    description = dict(metadata or {})
    # With it, for the order of several entries of a header is left to chance, and files would differ.
    header = {"json": json.dumps(description | {_CHECKSUM: _digest(plain, description)})}
    write_bytes(path, safetensors.torch.save(plain, header))


def load_tensors(path: Path, error: type[UserError] = RunError) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors by name, and the JSON object. Files of others have no checksum.

    Raises:
        UserError: of the class `error`, if the file is missing, damaged, or holds NaN or infinity.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if not isinstance(metadata, dict):
            raise ValueError("its description is no JSON object")
        if _CHECKSUM in metadata and metadata.pop(_CHECKSUM) != _digest(tensors, metadata):
            raise ValueError("its content is not what was written; take a copy, or make it again")
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or 'no such file'})") from problem
    except (safetensors.SafetensorError, ValueError, RecursionError) as problem:
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


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a module, by the names of its state.

    Raises:
        ValueError: if names, shapes or number formats are not the module's.
    """
    for name, own in module.state_dict().items():
        if name in tensors and tensors[name].dtype != own.dtype:
            raise ValueError(f"'{name}' holds {tensors[name].dtype}, not {own.dtype}")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as problem:
        raise ValueError(str(problem)) from problem


def _digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """SHA-256 of names, shapes, number formats and values, and of the description with them; in hexadecimal."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
