"""Files on disk: atomic writes, locks, and reading without executing code."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from dwp_pyro.runtime.errors import FolderLocked, RunError, UserError

__all__ = [
    "atomic_path",
    "file_digest",
    "files_digest",
    "locked",
    "new_folder",
    "read_json",
    "read_yaml",
    "write_bytes",
    "write_json",
    "write_yaml",
    "written",
]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffixes, and rename it to `path` on success.

    `path` has either its old content or the complete new one, whatever fails. Leftovers of killed writes of the same
    file are deleted.

    Raises:
        RunError: if the file cannot be written: no space, no permission, no such folder.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".tmp-{'[0-9a-f]' * 8}-{glob.escape(path.name)}"):
            leftover.unlink(missing_ok=True)
        temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)  # a power cut could otherwise undo this rename and keep a later one
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn an OSError while a file is written into a RunError with its path and a remedy."""
    try:
        yield
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, then resume" if full else "fix that, or choose another folder"
        raise RunError(f"{path}: cannot be written ({problem.strerror or problem}); {remedy}") from problem


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` on success.

    Raises:
        RunError: if `path` exists and is not an empty folder.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path}: exists already and is not overwritten; choose another folder or delete it")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden_folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-")
    with hidden_folder as parent:
        temporary = Path(parent, path.name)
        temporary.mkdir()
        yield temporary
        temporary.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity, which JSON cannot represent, become null."""
    write_bytes(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path, error: type[UserError] = RunError) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: of class `error`, if the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not valid JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: should hold a JSON object, found a {type(value).__name__}")
    return value


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping of plain values as YAML, atomically."""
    write_bytes(path, yaml.safe_dump(dict(value), sort_keys=False).encode())


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which would keep the last of several equal names without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for name, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1 and name != "<<":
                raise yaml.constructor.ConstructorError(problem=f"'{name}' is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, error: type[UserError] = RunError) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        UserError: of class `error`, if the file is missing or is not a mapping.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    # PyYAML also raises these for values that do not fit their tags.
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, yaml.YAMLError) as problem:
        raise error(f"{path}: is not valid YAML ({' '.join(str(problem).split())})") from problem
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise error(f"{path}: should hold 'name: value' lines")
    if _count_values(value, {}) > _MAX_VALUES:
        raise error(f"{path}: its aliases expand to more than {_MAX_VALUES:,} values; remove the aliases")
    return {str(key): item for key, item in value.items()}


_MAX_VALUES = 100_000


def _count_values(value: Any, counts: dict[int, float]) -> float:
    """Count the values in nested lists and mappings with all aliases expanded; infinite for recursive ones.

    Args:
        value: List, mapping or scalar.
        counts: Counts of the objects visited so far, by id, so that each is traversed once.
    """
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in counts:
        counts[id(value)] = math.inf
        children = value if isinstance(value, list) else [*value.keys(), *value.values()]
        counts[id(value)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(value)]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """Return one SHA-256 in hexadecimal for several files, in this order."""
    return hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest()


_locks: set[IO[str]] = set()


def _release_locks() -> None:
    """Release locks in forked children; a DataLoader worker would keep them after its parent is killed."""
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_release_locks)


@contextmanager
def locked(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Lock a folder, created if missing, so that one process at a time writes to it.

    Args:
        folder: Folder.
        name: Name of the lock, for a part of what the folder holds.
        wait: Whether to wait for a process that holds the lock.

    Raises:
        FolderLocked: if another process holds the lock, unless `wait`.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "a")  # noqa: SIM115 - closed below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise FolderLocked(f"{folder}: another process writes to it") from problem
        except OSError as problem:
            raise RunError(
                f"{folder}: cannot be locked ({problem.strerror}); choose a folder on another disk"
            ) from problem
        _locks.add(lock)
        try:
            yield
        finally:
            _locks.discard(lock)
