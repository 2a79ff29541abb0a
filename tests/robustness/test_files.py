"""Files that cannot be written, folders that are removed or locked: a one-line error, no lost data, resume."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import atomic_path, locked, write_json
from dwp_pyro.training import training_data
from dwp_pyro.training.metrics_log import MetricsLog
from tests.robustness.test_kill import COMMANDS, STUDY, results
from tests.robustness.trial import TrialResult, run
from tests.world import SVI_RUN, error_line

OTHER_COMMANDS = {
    "evaluate": ("evaluate", SVI_RUN, "--samples", 1),
    "phantom": ("phantom", "brats", "{out}/scans", "--cases", 2),
    "export": ("export", SVI_RUN, "{out}/bundle", "--format", "monai-bundle"),
    "inspect-prior": ("inspect-prior", "runs/prior-ms", "--out", "{out}/page"),
}


def limit_file_size(size: int) -> None:
    """Limit the size of each file of this process, to imitate a full disk; scans stay in memory."""
    training_data.mapped = lambda example: example
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_capabilities() -> None:
    """Drop the capabilities (linux/capability.h) by which root ignores permissions."""
    if os.geteuid() == 0:
        header, none = _Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), none) == 0


def arguments(name: str, out: Path) -> list[object]:
    if name in COMMANDS:
        return [*COMMANDS[name], "--out", out]
    return [str(part).format(out=out) for part in OTHER_COMMANDS[name]]


def failure_message(trial: TrialResult) -> str:
    """Return the error line of a failed trial."""
    assert trial.exit_code == 2, trial.output
    return error_line(trial.output)


def slow(name: str, fast: Sequence[str]) -> Any:
    """Return a parameter that the fast tests leave out, unless it is one of `fast`."""
    return pytest.param(name, marks=[] if name in fast else pytest.mark.slow)


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


@pytest.fixture
def own_world(copy_of_world: Path) -> Path:
    (copy_of_world / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return copy_of_world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [*((name, 3_000) for name in [*COMMANDS, *OTHER_COMMANDS]), ("svi", 30_000)])
def test_a_full_disk(own_world, tmp_path, name, size):
    """The error names the file, no partial file remains, and the command resumes when there is space."""
    out = tmp_path / "out"
    full = run(arguments(name, out), own_world, out, prepare=limit_file_size, args=(size,))
    line = failure_message(full)
    if name != "experiment":  # its error starts with the name of the run
        where = "runs/svi-brats" if name == "evaluate" else out
        assert re.search(rf"^Error: {where}\S*: cannot be written \(File too large\); free some space", line), line
    assert "File too large" in line
    assert not temporary_files(tmp_path) and not temporary_files(own_world)
    resume = ["--resume"] if name in COMMANDS and name != "experiment" and (out / "run.json").exists() else []
    resumed = run([*arguments(name, out), *resume], own_world, out)
    assert resumed.exit_code == 0, resumed.output
    if name in COMMANDS:
        undisturbed = tmp_path / "undisturbed"
        assert run(arguments(name, undisturbed), own_world, undisturbed).exit_code == 0
        assert results(out) == results(undisturbed)


@pytest.mark.parametrize("name", [slow(name, ("svi", "predict", "evaluate")) for name in [*COMMANDS, *OTHER_COMMANDS]])
def test_a_folder_without_write_permission(own_world, tmp_path, name):
    if name == "evaluate":
        read_only = own_world / SVI_RUN
    else:
        read_only = tmp_path / "read-only"
        read_only.mkdir()
    read_only.chmod(0o500)
    before = sorted(own_world.rglob("*"))
    trial = run(arguments(name, read_only / "out"), own_world, tmp_path / "out", prepare=drop_capabilities)
    read_only.chmod(0o700)
    line = failure_message(trial)
    assert str(read_only) in line or "runs/svi-brats" in line, line
    assert "Permission denied" in line and "choose another folder" in line
    assert sorted(own_world.rglob("*")) == before and (name == "evaluate" or not list(read_only.iterdir()))


@pytest.mark.parametrize("kind", ["flair", "seg"])
def test_a_scan_without_read_permission(own_world, tmp_path, kind):
    scan = next(own_world.glob(f"data/brats/HGG/*/*_{kind}.nii.gz"))
    scan.chmod(0)
    check_data = ("check-data", "--dataset", "brats", "--root", "data/brats", "--modality", "flair")
    line = failure_message(run(check_data, own_world, tmp_path / "out", prepare=drop_capabilities))
    assert scan.name in line and "Permission denied" in line


@pytest.mark.parametrize("name", [slow(name, ("svi",)) for name in ("svi", "finetune", "fit-prior")])
def test_a_run_folder_that_is_removed_during_training(command, own_world, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    log = MetricsLog.__call__

    def remove(self, step, metrics):
        shutil.rmtree(out)
        log(self, step, metrics)

    monkeypatch.setattr(MetricsLog, "__call__", remove)
    result = command(*COMMANDS[name], "--out", out)
    line = error_line(result.stderr)
    assert result.exit_code == 2 and f"{out}/metrics.jsonl: cannot be written (No such file or directory)" in line
    assert not (out / "run.json").exists()


@pytest.mark.parametrize("name", [slow(name, ("svi", "evaluate")) for name in [*COMMANDS, "evaluate"]])
def test_a_folder_that_another_process_locks(own_world, tmp_path, name):
    out = tmp_path / "out"
    folder = own_world / SVI_RUN / "predictions" if name == "evaluate" else out
    with locked(folder):
        trial = run(arguments(name, out), own_world, tmp_path / "log")
        assert "another process writes" in failure_message(trial)
        assert list(folder.iterdir()) == [folder / ".lock"]


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """A DataLoader worker survives its killed parent by some seconds."""
    read, write = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if not child:
            os.write(write, b"started")
            time.sleep(60)
            os._exit(0)
        message = os.read(read, 7)
    try:
        assert message == b"started"
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    """The write, the sync or the rename may fail."""
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, function in ((Path, "write_bytes"), (os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            with pytest.raises(RunError, match=r"a.json: cannot be written \(No space left on device\); free some"):
                write_json(path, {"new": 2})
        assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """The folder is synced last; a power cut leaves the old or the new file."""
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append("replace") or replace(self, target))
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert order == [str(temporary), "replace", str(tmp_path)]
