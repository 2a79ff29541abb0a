"""Mutations of files. Each takes the content of a file and a random generator, and returns the mutated content."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from dwp_pyro.runtime.tensors import _CHECKSUM, _digest, load_tensors

__all__ = ["mutate"]

Mutator = Callable[[bytes, random.Random], bytes]

_NUMBERS = (0, -1, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**64, 10**30, 0.5, 1e-320, 1e308)
#: Values of unexpected type, size or content.
_UNEXPECTED: tuple[Any, ...] = (
    *(None, True, False, *_NUMBERS, math.nan, math.inf, -math.inf, 10**400),
    *("", " ", "x", "1", "0", "..", "../x", "/", "a/b", "a\nb", "a\0b", "é ß 漢", "-x", "*", "nan", "1e5", "x" * 5000),
    *([], {}, [[]], [None], [1], ["x"], ["x", "x"], [0.5], [[1, 2], [3]], {"x": 1}, {"1": "x"}, {"x": {"x": []}}),
    [1] * 1000,
)
_TOKENS = (
    *("1e999", "-1", "0", "9" * 30, "9" * 5000, ".nan", "NaN", "null", "true", "[]", "{}", '"x"', "~", "- ", ": "),
    *("!!python/name:os.system ", "&a ", "*a", "\t", "\r", "\0", ",", ";", '"', "'", "#", "%", "\ufeff", "\ud7ff"),
    *("[" * 3000, '{"x":' * 3000),
)


def mutate(path: Path, content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a mutant of a file.

    Args:
        path: Path of the file; its suffix selects the mutations.
        content: Content of the file.
        others: Contents of other files, to splice with.
        rng: Random generator.
    """
    mutator = rng.choice((*_MUTATORS[path.suffix], _flip_bits, _change_bytes, _truncate))
    if rng.random() < 0.05:
        start, other = rng.randrange(len(content)), rng.choice(others)
        return content[:start] + other[rng.randrange(len(other)) :]
    return mutator(content, rng)


def _flip_bits(content: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, zero, fill with ones or insert elsewhere a slice of the content."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 2, 4, 16, 200)))
    piece, target = content[start:end], rng.randrange(len(content))
    return rng.choice(
        (
            content[:start] + content[end:],
            content[:start] + piece * 2 + content[end:],
            content[:start] + bytes(len(piece)) + content[end:],
            content[:start] + b"\xff" * len(piece) + content[end:],
            content[:target] + piece + content[target:],
        )
    )


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _change_number(content: bytes, rng: random.Random, header_size: int = 400) -> bytes:
    """Overwrite a field of the header with an extreme number."""
    field = b""
    while not field:
        format_, number = rng.choice("bBhHiIqQfd"), rng.choice((*_NUMBERS, math.nan, math.inf))
        try:
            field = struct.pack(rng.choice("<>") + format_, number if format_ in "fd" else int(number))
        except (struct.error, OverflowError, ValueError):
            continue
    start = rng.randrange(min(header_size, len(content)))
    start -= start % len(field)
    return content[:start] + field + content[start + len(field) :]


def _change_array_header(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a numpy array; keep its length."""
    text = content[10:128].decode("latin-1")
    mutated = _change_text(text.encode(), rng)[:118].ljust(117) + b"\n"
    return content[:10] + mutated + content[128:]


def _change_decompressed(content: bytes, rng: random.Random) -> bytes:
    """Change the decompressed content; the archive stays valid."""
    mutator = rng.choice((_flip_bits, _change_bytes, _truncate, _change_number, _change_number))
    return gzip.compress(mutator(gzip.decompress(content), rng), 1)


def _change_text(content: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or insert a line, or replace some characters by a token."""
    text = content.decode()
    if rng.random() < 0.3:
        lines = text.splitlines(keepends=True)
        line = rng.randrange(len(lines))
        lines[line : line + 1] = rng.choice(([], [lines[line]] * 2, [lines[line], rng.choice(lines)]))
        return "".join(lines).encode()
    start = rng.randrange(len(text))
    end = start + rng.choice((0, 1, 1, 3, 10))
    return (text[:start] + rng.choice(_TOKENS) + text[end:]).encode()


def _change_csv(content: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or replace a cell."""
    lines = content.decode().splitlines()
    separator = "\t" if "\t" in lines[0] else ","
    number = rng.randrange(len(lines))
    cells = lines[number].split(separator)
    cell = rng.randrange(len(cells))
    cells[cell : cell + 1] = rng.choice(([], [cells[cell]] * 2, [str(rng.choice(_UNEXPECTED))]))
    lines[number] = separator.join(cells)
    return ("\n".join(lines) + "\n").encode()


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a nested value with each of its keys or indices."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list) and item:
            yield from _items(item)


def _unexpected(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_UNEXPECTED))


def _change_tree(value: Any, rng: random.Random) -> Any:
    """Replace, rename, wrap or remove random items of a nested value, in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        items = list(_items(value)) if isinstance(value, dict | list) else []
        if not items or rng.random() < 0.01:
            return _unexpected(rng)
        container, key = rng.choice(items)
        choice = rng.random()
        if choice < 0.15:
            del container[key]
        elif choice < 0.3 and isinstance(container, dict):
            container[rng.choice(("x", "", "..", "a\nb", f"{key}2", "é"))] = container.pop(key)
        elif choice < 0.4:
            container[key] = [container[key]]
        elif choice < 0.5:
            container[key] = str(container[key])
        else:
            container[key] = _unexpected(rng)
    return value


def _change_json(content: bytes, rng: random.Random) -> bytes:
    text = json.dumps(_change_tree(json.loads(content), rng))
    if rng.random() < 0.1:  # repeat a key of an object
        text = text.replace("{", '{"' + rng.choice(text.split('"')[1::2] or ["x"]) + '": 1, ', 1)
    return text.encode()


def _change_yaml(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(_change_tree(yaml.safe_load(content), rng)).encode()


def _change_json_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _change_json(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def _change_tensor_header(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    choice = rng.random()
    if choice < 0.2:
        return rng.choice(_NUMBERS[:12]).to_bytes(16, "little", signed=True)[:8] + content[8:]
    mutator = _change_json if choice < 0.7 else rng.choice((_flip_bits, _change_bytes, _change_text))
    header = mutator(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _change_tensors(content: bytes, rng: random.Random) -> bytes:
    """Change tensors or metadata, with a valid checksum."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.safetensors")
        path.write_bytes(content)
        tensors, metadata = load_tensors(path)
        if rng.random() < 0.4:
            metadata = _change_tree(metadata, rng)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(list(tensors) or ["x"])
            tensors[rng.choice((name, name, name, f"{name}2"))] = _change_tensor(tensors.pop(name, torch.ones(2)), rng)
        if rng.random() < 0.2:
            tensors.popitem()
        if isinstance(metadata, dict):
            metadata |= {_CHECKSUM: _digest(tensors, metadata)}
        # `save_tensors` would reject NaN.
        plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        return safetensors.torch.save(plain, {"json": json.dumps(metadata)})


def _change_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    dtype = rng.choice((torch.float16, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool))
    return rng.choice(
        (
            tensor.to(dtype),
            tensor.flatten(),
            tensor[None],
            tensor.flatten()[:-1],
            torch.zeros_like(tensor),
            -tensor,
            tensor * rng.choice((1e30, 1e-30, 1e4)),
            torch.full_like(tensor, rng.choice((math.nan, math.inf, 3e38)) if tensor.is_floating_point() else -1),
        )
    )


_MUTATORS: dict[str, tuple[Mutator, ...]] = {
    ".gz": (_change_decompressed, _change_decompressed),
    ".nii": (_change_number, _change_number, _change_number),
    ".npy": (_change_array_header,),
    ".safetensors": (_change_tensor_header, _change_tensors, _change_tensors),
    ".json": (_change_json, _change_json, _change_json, _change_text),
    ".jsonl": (_change_json_line, _change_json_line, _change_text),
    ".yaml": (_change_yaml, _change_yaml, _change_yaml, _change_text, _change_text),
    ".csv": (_change_csv, _change_csv, _change_text),
    ".tsv": (_change_csv, _change_csv, _change_text),
}
