"""Ways to spoil a file. Each takes its content and a source of chance, and returns another content."""

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
#: Values that stand where others are expected.
_STRANGE: tuple[Any, ...] = (
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


def mutate(path: Path, content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A mutant of a file.

    Args:
        path: of the file; its suffixes say what it is.
        content: of the file.
        others: contents of other files, to splice with.
        chance: decides everything.
    """
    ways = _WAYS[path.suffix]
    way = chance.choice((*ways, _bits, _bytes, _cut))
    if chance.random() < 0.05:
        start, other = chance.randrange(len(content)), chance.choice(others)
        return content[:start] + other[chance.randrange(len(other)) :]
    return way(content, chance)


def _bits(content: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def _bytes(content: bytes, chance: random.Random) -> bytes:
    """A piece of it left out, doubled, zeroed or put elsewhere."""
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.choice((1, 2, 4, 16, 200)))
    piece, place = content[start:end], chance.randrange(len(content))
    return chance.choice(
        (
            content[:start] + content[end:],
            content[:start] + piece * 2 + content[end:],
            content[:start] + bytes(len(piece)) + content[end:],
            content[:start] + b"\xff" * len(piece) + content[end:],
            content[:place] + piece + content[place:],
        )
    )


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _numbers(content: bytes, chance: random.Random, most: int = 400) -> bytes:
    """An extreme number over a field of the header."""
    field = b""
    while not field:
        kind, number = chance.choice("bBhHiIqQfd"), chance.choice((*_NUMBERS, math.nan, math.inf))
        try:
            field = struct.pack(chance.choice("<>") + kind, number if kind in "fd" else int(number))
        except (struct.error, OverflowError, ValueError):
            continue
    start = chance.randrange(min(most, len(content)))
    start -= start % len(field)
    return content[:start] + field + content[start + len(field) :]


def _array(content: bytes, chance: random.Random) -> bytes:
    """The description of an array, its shape and number format; as long as it was."""
    text = content[10:128].decode("latin-1")
    spoiled = _text(text.encode(), chance)[:118].ljust(117) + b"\n"
    return content[:10] + spoiled + content[128:]


def _gzipped(content: bytes, chance: random.Random) -> bytes:
    """What is in the archive; the archive itself is whole."""
    return gzip.compress(chance.choice((_bits, _bytes, _cut, _numbers, _numbers))(gzip.decompress(content), chance), 1)


def _text(content: bytes, chance: random.Random) -> bytes:
    """A word, a line or a mark in it exchanged."""
    text = content.decode()
    if chance.random() < 0.3:
        lines = text.splitlines(keepends=True)
        line = chance.randrange(len(lines))
        lines[line : line + 1] = chance.choice(([], [lines[line]] * 2, [lines[line], chance.choice(lines)]))
        return "".join(lines).encode()
    start = chance.randrange(len(text))
    end = start + chance.choice((0, 1, 1, 3, 10))
    return (text[:start] + chance.choice(_TOKENS) + text[end:]).encode()


def _csv(content: bytes, chance: random.Random) -> bytes:
    """A cell of it exchanged, left out or doubled."""
    lines = content.decode().splitlines()
    mark = "\t" if "\t" in lines[0] else ","
    number = chance.randrange(len(lines))
    cells = lines[number].split(mark)
    cell = chance.randrange(len(cells))
    cells[cell : cell + 1] = chance.choice(([], [cells[cell]] * 2, [str(chance.choice(_STRANGE))]))
    lines[number] = mark.join(cells)
    return ("\n".join(lines) + "\n").encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a value with each key or index of it."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list) and item:
            yield from _places(item)


def _strange(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(_STRANGE))


def _tree(value: Any, chance: random.Random) -> Any:
    """Another type, another number or nothing at a random place of a tree of plain values; changed in place."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(value)) if isinstance(value, dict | list) else []
        if not places or chance.random() < 0.01:
            return _strange(chance)
        container, key = chance.choice(places)
        way = chance.random()
        if way < 0.15:
            del container[key]
        elif way < 0.3 and isinstance(container, dict):
            container[chance.choice(("x", "", "..", "a\nb", f"{key}2", "é"))] = container.pop(key)
        elif way < 0.4:
            container[key] = [container[key]]
        elif way < 0.5:
            container[key] = str(container[key])
        else:
            container[key] = _strange(chance)
    return value


def _json(content: bytes, chance: random.Random) -> bytes:
    text = json.dumps(_tree(json.loads(content), chance))
    if chance.random() < 0.1:  # a key of an object twice
        text = text.replace("{", '{"' + chance.choice(text.split('"')[1::2] or ["x"]) + '": 1, ', 1)
    return text.encode()


def _yaml(content: bytes, chance: random.Random) -> bytes:
    return yaml.safe_dump(_tree(yaml.safe_load(content), chance)).encode()


def _lines_of_json(content: bytes, chance: random.Random) -> bytes:
    lines = content.splitlines()
    number = chance.randrange(len(lines))
    lines[number] = _json(lines[number], chance)
    return b"\n".join(lines) + b"\n"


def _header(content: bytes, chance: random.Random) -> bytes:
    """The header of tensors: their names, shapes, number formats and offsets, and what describes them."""
    length = int.from_bytes(content[:8], "little")
    way = chance.random()
    if way < 0.2:
        return chance.choice(_NUMBERS[:12]).to_bytes(16, "little", signed=True)[:8] + content[8:]
    header = (_json if way < 0.7 else chance.choice((_bits, _bytes, _text)))(content[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _tensors(content: bytes, chance: random.Random) -> bytes:
    """Other tensors or another description, under a checksum of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.safetensors")
        path.write_bytes(content)
        tensors, metadata = load_tensors(path)
        if chance.random() < 0.4:
            metadata = _tree(metadata, chance)
        for _ in range(chance.choice((1, 1, 2))):
            name = chance.choice(list(tensors) or ["x"])
            tensors[chance.choice((name, name, name, f"{name}2"))] = _other(tensors.pop(name, torch.ones(2)), chance)
        if chance.random() < 0.2:
            tensors.popitem()
        if isinstance(metadata, dict):
            metadata |= {_CHECKSUM: _digest(tensors, metadata)}
        # Not by `save_tensors`, which writes no NaN.
        plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        return safetensors.torch.save(plain, {"json": json.dumps(metadata)})


def _other(tensor: Tensor, chance: random.Random) -> Tensor:
    format_ = chance.choice((torch.float16, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool))
    return chance.choice(
        (
            tensor.to(format_),
            tensor.flatten(),
            tensor[None],
            tensor.flatten()[:-1],
            torch.zeros_like(tensor),
            -tensor,
            tensor * chance.choice((1e30, 1e-30, 1e4)),
            torch.full_like(tensor, chance.choice((math.nan, math.inf, 3e38)) if tensor.is_floating_point() else -1),
        )
    )


_WAYS: dict[str, tuple[Mutator, ...]] = {
    ".gz": (_gzipped, _gzipped),
    ".nii": (_numbers, _numbers, _numbers),
    ".npy": (_array,),
    ".safetensors": (_header, _tensors, _tensors),
    ".json": (_json, _json, _json, _text),
    ".jsonl": (_lines_of_json, _lines_of_json, _text),
    ".yaml": (_yaml, _yaml, _yaml, _text, _text),
    ".csv": (_csv, _csv, _text),
    ".tsv": (_csv, _csv, _text),
}
