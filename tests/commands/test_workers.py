"""`--workers`: parts of a command in processes of their own, with the results of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dwp_pyro.prediction import predict
from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import locked
from dwp_pyro.training.metrics_log import read_metrics
from tests.world import SVI_RUN, TINY, call, error_line

pytestmark = pytest.mark.slow

SVI = ("svi", "--dataset", "brats", "--prior", "dwp", "--n", "2", *TINY, "--members", "2")
UNLABELLED = (*SVI[:-2], "--members", "2", "--unlabelled", "data/two")


def same_files(found: Path, expected: Path, names: list[str]) -> bool:
    return all((found / name).read_bytes() == (expected / name).read_bytes() for name in names)


def records(run: Path) -> list[tuple]:
    return sorted(tuple(sorted(record.items())) for record in read_metrics(run / "metrics.jsonl"))


@pytest.mark.parametrize("command", [SVI, UNLABELLED], ids=["members", "members of both rounds"])
def test_members(in_world, tmp_path, command):
    results = [call(*command, "--out", tmp_path / name, *more) for name, more in RUNS.items()]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    assert same_files(tmp_path / "parallel", tmp_path / "one", ["posterior.safetensors", "split.json", "run.json"])
    assert records(tmp_path / "parallel") == records(tmp_path / "one")
    # Only a process that trains a member reports its progress, and workers are silent.
    assert ["-member1: " in result.stderr for result in results] == [True, False]
    assert not list((tmp_path / "parallel").glob("checkpoint*"))


RUNS: dict[str, tuple[str, ...]] = {"one": (), "parallel": ("--workers", "2")}


def test_bootstraps(in_world, tmp_path):
    result = call("fit-prior", *TINY, "--bootstraps", 2, "--density-steps", 20, "--workers", 2, "--out", tmp_path / "p")
    assert result.exit_code == 0, result.output
    names = ["prior.safetensors", "kernels.safetensors", "source.safetensors", "moments.safetensors"]
    assert same_files(tmp_path / "p", Path("runs/prior-ms"), names)
    assert records(tmp_path / "p") == records(Path("runs/prior-ms"))


def test_predictions_and_metrics(copy_of_world, tmp_path):
    for name, more in RUNS.items():
        result = call("predict", SVI_RUN, "data/two", "--samples", 2, "--out", tmp_path / name, *more)
        assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if not path.name.startswith("."))
    assert len(names) == 12
    assert same_files(tmp_path / "parallel", tmp_path / "one", names)
    tables = []
    for more in RUNS.values():
        result = call("evaluate", SVI_RUN, "--samples", 2, *more)
        assert result.exit_code == 0, result.output
        tables.append((Path(SVI_RUN, "evaluation.csv").read_text(), Path(SVI_RUN, "evaluation.json").read_text()))
    assert tables[0] == tables[1]


def test_workers_within_torchrun_are_refused(in_world, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    result = call(*SVI, "--out", tmp_path / "run", "--workers", 2)
    assert result.exit_code == 2
    assert "workers, cluster: torchrun starts processes of its own" in result.output
    assert not (tmp_path / "run").exists()


def test_a_worker_that_outlives_its_command_locks_its_member(in_world, tmp_path):
    """Out of the way of a resumed command, and of one that starts again."""
    out = tmp_path / "run"
    assert call(*SVI, "--out", out).exit_code == 0
    (out / "posterior.safetensors").unlink()
    state = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(state | {"finished": False}))
    with locked(out, ".lock-svi-member0"):
        for option in ("--resume", "--overwrite"):
            result = call(*SVI, "--out", out, option)
            assert result.exit_code == 2
            assert "another process writes to it; wait for it, stop it, or give another --out" in result.output
    assert (out / "metrics.jsonl").exists()
    assert call(*SVI, "--out", out, "--overwrite").exit_code == 0


def test_a_worker_that_outlives_its_command_locks_its_case(copy_of_world, tmp_path):
    out = tmp_path / "maps"
    case = sorted(path.name for path in Path("data/two/HGG").iterdir())[0]
    with locked(out, f".lock-{case}"):
        result = call("predict", SVI_RUN, "data/two", "--samples", 1, "--out", out, "--workers", 1)
    assert result.exit_code == 2
    assert f"case {case}: {out}: another process writes to it" in result.output
    assert not (out / f"{case}.json").exists()


def test_a_posterior_that_changes_meanwhile_is_an_error(in_world):
    with pytest.raises(RunError, match="was trained again since the command started"):
        predict._load_once(Path(SVI_RUN), "another digest")


def test_a_case_whose_map_is_damaged_is_one_line(copy_of_world, tmp_path):
    run = Path(SVI_RUN)
    assert call("evaluate", run, "--samples", 1).exit_code == 0
    maps = sorted((run / "predictions").glob("*_prob.nii.gz"))
    maps[0].write_bytes(b"no map")
    result = call("evaluate", run, "--samples", 1, "--workers", 2)
    assert result.exit_code == 2
    line = error_line(result.output)
    assert maps[0].name in line


def test_a_killed_worker_is_one_line_and_one_process_resumes(in_world, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dwp_pyro", *SVI, "--steps", "400", "--out", str(out)]
    running = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    for _ in range(1200):
        if {record["stage"] for record in read_metrics(metrics)} == {"svi-member0", "svi-member1"}:
            break
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(running.pid), "-f", "spawn_main"], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2
    line = error_line(errors)
    assert "svi-member" in line and "a worker process was killed" in line
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((out / "run.json").read_text())["finished"]
    steps = [(record["stage"], record["step"]) for record in read_metrics(metrics)]
    assert len(steps) == len(set(steps)) and ("svi-member1", 200) in steps
