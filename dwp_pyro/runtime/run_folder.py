"""Run folders: state, settings, metrics and results of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dwp_pyro.runtime.errors import FolderTaken, RunError, RunFinished, RunOutdated, RunUnfinished
from dwp_pyro.runtime.files import locked, read_json, read_yaml, write_json, write_yaml
from dwp_pyro.runtime.signals import resumable

__all__ = ["RunFolder", "check_pinned"]

FORMAT_VERSION = 1


class RunFolder:
    """Folder of one run: `run.json` (command, state), `config.yaml`, `metrics.jsonl` and results.

    Created by `RunFolder.start`, which keeps runs apart and admits one process at a time.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.command = command

    @classmethod
    @contextmanager
    def start(
        cls, path: Path, command: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> Iterator[RunFolder]:
        """Lock a run folder for writing, and mark the run finished when the block succeeds.

        Args:
            path: Run folder; created if missing.
            command: Command that writes the run, e.g. "svi".
            config: Resolved settings, saved as `config.yaml`.
            resume: Whether to resume an unfinished run; its settings must be equal.
            overwrite: Whether to delete the files of a previous run of the same command.

        Raises:
            RunError: if the folder holds a finished run, an unfinished run without `resume`, a run of another command
                or other files, or if another process uses it.
        """
        cls.check(path, command, config, resume=resume, overwrite=overwrite)
        with locked(path):
            run = cls(path, command)
            if overwrite or run._state().get("being_cleared") is True:
                run._clear()
            run.record(finished=False)
            write_yaml(path / "config.yaml", config)
            with resumable():
                yield run
            run.record(finished=True)

    @staticmethod
    def check(path: Path, command: str, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raise the RunError that `start` would raise; called before expensive preparations."""
        if resume and overwrite:
            raise RunError("resume and overwrite exclude each other; choose one")
        if path.exists() and not path.is_dir():
            raise FolderTaken(f"{path}: is a file, expected a folder")
        if not path.exists() or all(name.name.startswith(".") for name in path.iterdir()):
            if resume:
                raise RunError(f"{path}: holds no run to resume")
            return
        if not (path / "run.json").exists():
            raise FolderTaken(f"{path}: holds files that are not a run of dwp-pyro")
        state = read_json(path / "run.json")
        if state.get("command") != command:
            raise FolderTaken(f"{path}: holds a run of '{state.get('command')}', not of '{command}'")
        if overwrite or state.get("being_cleared") is True:  # a killed overwrite, which `start` completes
            return
        if state.get("finished"):
            raise RunFinished(f"{path}: holds a finished run")
        if not resume:
            raise RunUnfinished(f"{path}: holds an unfinished run")
        if not (path / "config.yaml").exists():  # killed between the first two files
            return
        saved = read_yaml(path / "config.yaml")
        current = yaml.safe_load(yaml.safe_dump(dict(config)))
        unknown = sorted(saved.keys() ^ current.keys())
        if unknown:
            raise RunOutdated(f"{path}: cannot resume a run of another version, with settings {', '.join(unknown)}")
        changed = [f"{key} was {saved[key]}" for key in sorted(current) if saved[key] != current[key]]
        if changed:
            raise RunOutdated(f"{path}: cannot resume with other settings ({', '.join(changed)})")

    def pin(self, name: str, value: Mapping[str, Any]) -> None:
        """Write what the run depends on to a JSON file; a resumed run must depend on the same.

        Raises:
            RunOutdated: if the file exists with another content.
        """
        path = self.path / name
        if path.exists():
            check_pinned(path, {**dict.fromkeys(read_json(path)), **value})
        write_json(path, value)

    def record(self, **values: Any) -> None:
        """Set values in `run.json`; they survive a resume."""
        write_json(
            self.path / "run.json", {"format": FORMAT_VERSION, "command": self.command, **self._state(), **values}
        )

    def _state(self) -> dict[str, Any]:
        return read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}

    def _clear(self) -> None:
        for lock in self.path.rglob(".lock*"):  # of a prediction, or a worker of a cluster that outlives its command
            if lock != self.path / ".lock":
                with locked(lock.parent, lock.name):
                    pass
        # Mark the state first: after a kill, the rest is neither a finished nor a resumable run.
        self.record(finished=False, being_cleared=True)
        state = self.path / "run.json"
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path != state and not (path.parent == self.path and path.name.startswith(".lock")):
                path.unlink()
        state.unlink()


def check_pinned(path: Path, values: Mapping[str, Any]) -> None:
    """Check that what a run depends on is what `RunFolder.pin` has written.

    Raises:
        RunOutdated: if one of the values differs.
    """
    saved, current = read_json(path), json.loads(json.dumps(values))
    if any(saved.get(name) != value for name, value in current.items()):
        raise RunOutdated(
            f"{path}: cannot continue, because the scans, the split or the prior have changed since the run started"
        )
