"""Files on disk: written whole or not at all, read without running code, and the folder of a run.

Small things are JSON or YAML, read without running code; tensors are in `tensors`.
"""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from dwp_pyro.errors import RunError, UserError
from dwp_pyro.signals import resumable

__all__ = [
    "RunFolder",
    "atomic_path",
    "file_digest",
    "locked",
    "new_folder",
    "read_json",
    "read_yaml",
    "write_bytes",
    "write_json",
    "write_yaml",
    "written",
]

FORMAT_VERSION = 1


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffixes; on success it takes the name `path`.

    Whatever goes wrong inside, `path` holds either its old content or the whole new one. What a killed write of the
    same file left is removed.

    Raises:
        RunError: if the system refuses the file: no space, no permission, no such folder.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for litter in path.parent.glob(f".tmp-{'[0-9a-f]' * 8}-{glob.escape(path.name)}"):
            litter.unlink(missing_ok=True)
        temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)  # or a power cut might undo the change of name, and not that of a later file
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
    """While a file is written: what the system says against it names the file, and what to do."""
    try:
        yield
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space there, then go on" if full else "mend that, or choose another folder"
        raise RunError(f"{path}: cannot be written ({problem.strerror or problem}); {remedy}") from problem


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, to be filled; on success it takes the name `path`.

    Raises:
        RunError: if there is something at `path` already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path}: exists already and is not overwritten; choose another folder, or delete it")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden_folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-")
    with hidden_folder as hidden:
        temporary = Path(hidden, path.name)
        temporary.mkdir()
        yield temporary
        temporary.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all; NaN and infinity become null."""
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
        UserError: of the class `error`, if the file is missing or is not a JSON object.
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
    """Write a mapping of plain values as YAML, whole or not at all."""
    write_bytes(path, yaml.safe_dump(dict(value), sort_keys=False).encode())


def read_yaml(path: Path, error: type[UserError] = RunError) -> dict[str, Any]:
    """Read a YAML mapping; empty files are empty mappings.

    Raises:
        UserError: of the class `error`, if the file is missing or is not a mapping of names.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    except (ValueError, RecursionError, yaml.YAMLError) as problem:
        raise error(f"{path}: is not valid YAML ({' '.join(str(problem).split())})") from problem
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise error(f"{path}: should hold 'name: value' lines")
    if _parts(value, {}) > _MOST_PARTS:
        raise error(f"{path}: its aliases stand for more than {_MOST_PARTS:,} values; write them out")
    return {str(key): item for key, item in value.items()}


_MOST_PARTS = 100_000


def _parts(value: Any, counted: dict[int, float]) -> float:
    """How many values there are in nested lists and mappings; each is counted once, as often as it stands there."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in counted:
        counted[id(value)] = math.inf  # until it is known: of a list that holds itself
        inside = value if isinstance(value, list) else [*value.keys(), *value.values()]
        counted[id(value)] = 1 + sum(_parts(item, counted) for item in inside)
    return counted[id(value)]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_locks: set[IO[str]] = set()


def _let_go() -> None:
    """What is forked meanwhile (a data loader, beside a GPU) would hold the locks on when this process is killed."""
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if absent: one process at a time writes there.

    Raises:
        RunError: if another process holds it.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 - closed below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise RunError(
                f"{folder}: another process is writing this run; wait for it, or choose another --out"
            ) from problem
        _locks.add(lock)
        try:
            yield
        finally:
            _locks.discard(lock)


class RunFolder:
    """The folder of one run: `run.json` (command, state), `config.yaml`, `metrics.jsonl` and results.

    Made by `RunFolder.start`, which refuses to mix runs; one process holds it at a time.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command
        self._recorded: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def start(
        cls, path: Path, command: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Iterator[RunFolder]:
        """Open a run folder for writing, locked, and mark it finished when the block succeeds.

        Args:
            path: the folder; made if absent.
            command: the command that fills it, e.g. "svi".
            config: the resolved settings, saved as `config.yaml`.
            resume: go on with an unfinished run; its settings must be the same ones.
            overwrite: delete what a former run of the same command left.

        Raises:
            RunError: if the folder holds a finished run, an unfinished one without `resume`, another
                command's run, foreign files, or is in use by another process.
        """
        cls.check(path, command, config, resume=resume, overwrite=overwrite)
        with locked(path):
            run = cls(path, command)
            if overwrite or _is_being_cleared(path):
                run._clear()
            elif (path / "run.json").exists():
                recorded = read_json(path / "run.json").items()
                run._recorded = {key: value for key, value in recorded if key not in ("format", "command", "finished")}
            run._write_state(finished=False)
            write_yaml(path / "config.yaml", config)
            with resumable():
                yield run
            run._write_state(finished=True)

    @staticmethod
    def check(path: Path, command: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raise RunError where `start` would refuse; called before the work that comes ahead of it."""
        if resume and overwrite:
            raise RunError("--resume and --overwrite contradict each other: give one of them")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file; --out names a folder")
        if not path.exists() or all(name.name.startswith(".") for name in path.iterdir()):
            if resume:
                raise RunError(f"{path}: there is no run to resume; leave --resume out to start one")
            return
        if not (path / "run.json").exists():
            raise RunError(f"{path}: holds files, but no run of dwp-pyro; choose another --out")
        state = read_json(path / "run.json")
        if state.get("command") != command:
            raise RunError(f"{path}: holds a run of '{state.get('command')}', not of '{command}'; choose another --out")
        if overwrite or _is_being_cleared(path):
            return
        if state.get("finished"):
            raise RunError(f"{path}: holds a finished run; choose another --out, or give --overwrite to replace it")
        if not resume:
            raise RunError(f"{path}: holds an unfinished run; give --resume to go on, or --overwrite to start again")
        if not (path / "config.yaml").exists():  # killed between the two first files
            return
        saved = read_yaml(path / "config.yaml")
        current = yaml.safe_load(yaml.safe_dump(dict(config)))
        unknown = sorted(saved.keys() ^ current.keys())
        if unknown:
            raise RunError(
                f"{path}: cannot resume a run of another version, which has other settings ({', '.join(unknown)}); "
                "give --overwrite to start again"
            )
        changed = sorted(key for key in current if saved[key] != current[key])
        if changed:
            raise RunError(
                f"{path}: cannot resume with other settings ({', '.join(changed)} changed); give the same ones"
            )

    def pin(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file that says what the run depends on; a resumed run must depend on the same.

        Raises:
            RunError: if the file is there and says something else.
        """
        path = self.path / name
        if path.exists() and read_json(path) != json.loads(json.dumps(value)):
            raise RunError(
                f"{path}: cannot resume, what the run depends on has changed since it was begun (scans added or "
                "removed, another split file, another prior); restore it, or give --overwrite to start again"
            )
        write_json(path, value)

    def record(self, key: str, value: Any) -> None:
        """Add a value to `run.json`; a resumed run keeps it."""
        self._recorded[key] = value
        self._write_state(finished=False)

    def _clear(self) -> None:
        # What is left when a kill comes in between is neither a finished run nor one to resume.
        self._write_state(finished=False, being_cleared=True)
        state = self.path / "run.json"
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path not in (self.path / ".lock", state):
                path.unlink()
        state.unlink()

    def _write_state(self, finished: bool, **more: bool) -> None:
        state = {"format": FORMAT_VERSION, "command": self.command, "finished": finished, **more}
        write_json(self.path / "run.json", {**state, **self._recorded})


def _is_being_cleared(run: Path) -> bool:
    """Whether --overwrite was killed before all of the former run was deleted."""
    return (run / "run.json").exists() and read_json(run / "run.json").get("being_cleared") is True
