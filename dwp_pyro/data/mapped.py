"""Examples in memory-mapped files: as many cases as the disk holds can be trained on."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from monai.data import MetaTensor
from torch import Tensor

from dwp_pyro.data.preprocessing import Example
from dwp_pyro.runtime.files import written

__all__ = ["mapped"]


def mapped(example: Example) -> Example:
    """Return an equal example whose tensors are in files that are mapped into memory.

    The operating system reads pages on demand and drops them when memory is short. The files are in the folder for
    temporary files ($TMPDIR); they have no name and disappear with the last process that uses them.

    Raises:
        RunError: If the disk is full.
    """
    _trim_heap()
    return replace(
        example,
        image=_mapped_volume(example.image),
        brain_mask=_mapped_volume(example.brain_mask),
        label=None if example.label is None else _mapped_volume(example.label),
        indices=tuple(_mapped(each) for each in example.indices),
    )


def _trim_heap() -> None:
    """Return freed memory to the system: the next example does not fit the holes that the previous one has left."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _mapped_volume(volume: MetaTensor) -> MetaTensor:
    tensor = _mapped(volume.as_tensor())
    return MetaTensor(tensor, meta=volume.meta, applied_operations=volume.applied_operations)


def _mapped(tensor: Tensor) -> Tensor:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    if not len(content):
        return tensor
    with written(Path(tempfile.gettempdir())), tempfile.NamedTemporaryFile() as file:
        file.write(content.data)
        file.flush()
        return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
