"""Files that cannot be written, folders that go away, and folders that others hold: one line, nothing lost, go on."""

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
from pathlib import Path

import pytest
import yaml

from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import atomic_path, locked, write_json
from dwp_pyro.training.metrics_log import MetricsLog
from tests.robustness.test_kill import COMMANDS, STUDY, results
from tests.robustness.trial import Ended, run

OTHERS = {
    "evaluate": ("evaluate", "runs/svi-brats-dwp-n2-seed0", "--samples", 1),
    "phantom": ("phantom", "brats", "{out}/scans", "--cases", 2),
    "export": ("export", "runs/svi-brats-dwp-n2-seed0", "{out}/bundle", "--format", "monai-bundle"),
    "inspect-prior": ("inspect-prior", "runs/prior-ms", "--out", "{out}/page"),
}


def limit_size(size: int) -> None:
    """No file may grow beyond it, as if the disk were full there: in the process of a trial."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def obey_permissions() -> None:
    """Root may write anywhere, by capabilities (linux/capability.h) that are given up here."""
    if os.geteuid() == 0:
        header, none = _Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), none) == 0


def arguments(name: str, out: Path) -> list[object]:
    if name in COMMANDS:
        return [*COMMANDS[name], "--out", out]
    return [str(part).format(out=out) for part in OTHERS[name]]


def line_of(ended: Ended) -> str:
    """The one line that an error is told by."""
    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said, ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
    return line


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


@pytest.fixture
def own_world(copy_of_world: Path) -> Path:
    (copy_of_world / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return copy_of_world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [*((name, 3_000) for name in [*COMMANDS, *OTHERS]), ("svi", 30_000)])
def test_a_full_disk(own_world, tmp_path, name, size):
    """Whatever file is the first that does not fit, it is named, and no half of it left; with space all goes on."""
    out = tmp_path / "out"
    full = run(arguments(name, out), own_world, out, prepare=limit_size, given=(size,))
    line = line_of(full)
    if name != "experiment":  # which names its cell
        where = "runs/svi-brats" if name == "evaluate" else out
        assert re.search(rf"^Error: {where}\S*: cannot be written \(File too large\); free some space", line), line
    assert "File too large" in line
    assert not litter(tmp_path) and not litter(own_world)
    resumes = ["--resume"] if name in COMMANDS and name != "experiment" and (out / "run.json").exists() else []
    again = run([*arguments(name, out), *resumes], own_world, out)
    assert again.code == 0, again.said
    if name in COMMANDS:
        whole = tmp_path / "whole"
        assert run(arguments(name, whole), own_world, whole).code == 0
        assert results(out) == results(whole)


@pytest.mark.parametrize("name", [*COMMANDS, *OTHERS])
def test_a_folder_that_may_not_be_written(own_world, tmp_path, name):
    if name == "evaluate":
        shut = own_world / "runs/svi-brats-dwp-n2-seed0"
    else:
        shut = tmp_path / "shut"
        shut.mkdir()
    shut.chmod(0o500)
    before = sorted(own_world.rglob("*"))
    ended = run(arguments(name, shut / "out"), own_world, tmp_path / "out", prepare=obey_permissions)
    shut.chmod(0o700)
    line = line_of(ended)
    assert str(shut) in line or "runs/svi-brats" in line, line
    assert "Permission denied" in line and "choose another folder" in line
    assert sorted(own_world.rglob("*")) == before and (name == "evaluate" or not list(shut.iterdir()))


@pytest.mark.parametrize("kind", ["flair", "seg"])
def test_a_scan_that_may_not_be_read(own_world, tmp_path, kind):
    scan = next(own_world.glob(f"data/brats/HGG/*/*_{kind}.nii.gz"))
    scan.chmod(0)
    looking = ("check-data", "--dataset", "brats", "--root", "data/brats", "--modality", "flair")
    line = line_of(run(looking, own_world, tmp_path / "out", prepare=obey_permissions))
    assert scan.name in line and "Permission denied" in line


@pytest.mark.parametrize("name", ["svi", "finetune", "fit-prior"])
def test_a_run_folder_that_is_removed_in_the_midst(command, own_world, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    log = MetricsLog.__call__

    def remove(self, at, metrics):
        shutil.rmtree(out)
        log(self, at, metrics)

    monkeypatch.setattr(MetricsLog, "__call__", remove)
    result = command(*COMMANDS[name], "--out", out)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and f"{out}/metrics.jsonl: cannot be written (No such file or directory)" in line
    assert not (out / "run.json").exists()


@pytest.mark.parametrize("name", [*COMMANDS, "evaluate"])
def test_a_folder_that_another_process_holds(own_world, tmp_path, name):
    out = tmp_path / "out"
    held = own_world / "runs/svi-brats-dwp-n2-seed0/predictions" if name == "evaluate" else out
    with locked(held):
        ended = run(arguments(name, out), own_world, tmp_path / "log")
        assert "another process writes" in line_of(ended)
        assert list(held.iterdir()) == [held / ".lock"]


def test_a_process_that_was_forked_does_not_hold_the_folder(tmp_path):
    """A data loader's, beside a GPU: it lives on for seconds after this one has been killed."""
    read, write = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if not child:
            os.write(write, b"here")
            time.sleep(60)
            os._exit(0)
        here = os.read(read, 4)
    try:
        assert here == b"here"
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_refused_file_keeps_its_old_content(tmp_path, monkeypatch):
    """The system may refuse a write, the sync or the change of name."""
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, function in ((Path, "write_bytes"), (os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, refuse)
            with pytest.raises(RunError, match=r"a.json: cannot be written \(No space left on device\); free some"):
                write_json(path, {"new": 2})
        assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Content, then name, then folder: a power cut in between leaves the old file or the new."""
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("replace") or replace(self, to))
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert order == [str(temporary), "replace", str(tmp_path)]
