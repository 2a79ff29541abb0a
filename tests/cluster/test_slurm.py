"""The scripts of docs/how-to/resume-and-cluster.md run under Slurm, and resume after it has taken their node."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import ENVIRONMENT, documented_script, wait_until
from tests.commands.test_experiment import runs_of

pytestmark = pytest.mark.slow

SETTINGS = {"members": 1, "widths": [2, 3, 4, 5], "patch": 24, "validation": 1}


def lines_of(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_a_requeued_job_gives_the_posterior_of_an_uninterrupted_run(slurm, scans, tmp_path):
    run, config = tmp_path / "runs/mine", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | {"root": str(scans), "center": "none", "n": 2, "steps": 200}))
    resources = {"--cpus-per-task=8 --gres=gpu:1": "--cpus-per-task=1"}
    script = documented_script("svi", resources | {"--root SCANS --n 5": f"--config {config}"})
    job = slurm.submit(script, tmp_path)
    wait_until(lambda: lines_of(run / "metrics.jsonl") > 2, tmp_path)
    slurm.preempt()
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", tmp_path)
    assert "stopped by SIGTERM, checkpoint saved" in (tmp_path / "job.log").read_text()
    assert list(run.glob("checkpoint*"))
    logged = lines_of(run / "metrics.jsonl")
    wait_until(lambda: lines_of(run / "metrics.jsonl") > logged + 2, tmp_path)
    slurm.call("scontrol", "requeue", job)
    wait_until(lambda: slurm.job(job)["JobState"] == "COMPLETED", tmp_path)
    assert slurm.job(job)["Restarts"] == "2"
    command = ("dwp-pyro", "svi", "--config", config, "--out", tmp_path / "alone")
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    for file in ("posterior.safetensors", "metrics.jsonl"):
        assert (run / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def test_a_study_on_dask_workers_resumes(slurm, scans, tmp_path):
    study = {
        "settings": SETTINGS | {"root": str(scans), "steps": 40},
        "methods": {"SVI": {"command": "svi", "center": "none"}, "UNet-RI": {"command": "finetune", "init": "random"}},
        "runs": [{"methods": ["SVI", "UNet-RI"], "n": [2], "seeds": [0]}],
        "samples": 2,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    resources = {"--ntasks=8 --cpus-per-task=4 --gpus-per-task=1": "--ntasks=2 --cpus-per-task=1"}
    job = slurm.submit(documented_script("dask scheduler", resources), tmp_path)
    out = tmp_path / "runs/study"
    wait_until(lambda: list(out.glob("runs/*/metrics.jsonl")), tmp_path)
    slurm.preempt()
    wait_until(lambda: slurm.job(job)["JobState"] == "COMPLETED", tmp_path)
    assert slurm.job(job)["Restarts"] == "1"
    assert runs_of(out) == [("SVI", "2", "0"), ("UNet-RI", "2", "0")]
