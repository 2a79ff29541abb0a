"""A command stopped by a signal resumes with --resume and gives identical results."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from dwp_pyro.runtime.tensors import load_tensors, save_tensors
from dwp_pyro.training.metrics_log import MetricsLog
from tests.world import SVI_RUN, TINY

QUICK = ("--density-steps", 20)
COMMANDS = {
    "svi": (
        ("svi", "--prior", "dwp", "--n", 2, *TINY, "--members", 2),
        SVI_RUN,
        ("svi-member0", 2),
    ),
    "finetune": (
        ("finetune", "--n", 2, "--init", "source", *TINY),
        "runs/finetune-brats-source-all-n2-seed0",
        ("finetune", 3),
    ),
    "fit-prior": (("fit-prior", *TINY, "--bootstraps", 2, *QUICK), "runs/prior-ms", ("bootstrap1", 2)),
}
RESULTS = ("posterior.safetensors", "source.safetensors", "kernels.safetensors", "prior.safetensors", "split.json")


@pytest.mark.parametrize(
    "name", ["finetune", *(pytest.param(name, marks=pytest.mark.slow) for name in ("svi", "fit-prior"))]
)
def test_stopped_and_resumed(command, in_world, tmp_path, monkeypatch, name):
    arguments, undisturbed, (stage, step) = COMMANDS[name]
    out = tmp_path / "run"
    log = MetricsLog.__call__

    def stop(self, at, metrics):
        log(self, at, metrics)
        if (self.stage, at) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "__call__", stop)
        stopped = command(*arguments, "--out", out)
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "SIGTERM, checkpoint saved; resume with --resume" in stopped.stderr
    assert not json.loads((out / "run.json").read_text())["finished"]
    assert command(*arguments, "--out", out).exit_code == 2
    for checkpoint in list(out.rglob("checkpoint*.safetensors")):  # as if a write had been killed
        shutil.copy(checkpoint, checkpoint.with_name(f".tmp-0123abcd-other-{checkpoint.name}"))
    resumed = command(*arguments, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert not list(out.rglob("*checkpoint*"))
    compared = [result for result in RESULTS if Path(undisturbed, result).exists()]
    assert len(compared) >= 2
    for result in compared:
        assert (out / result).read_bytes() == Path(undisturbed, result).read_bytes(), result
    assert (out / "metrics.jsonl").read_text() == Path(undisturbed, "metrics.jsonl").read_text()


def test_a_changed_prior_is_detected(command, copy_of_world):
    arguments, finished, _ = COMMANDS["svi"]
    (Path(finished) / "run.json").write_text(json.dumps({"format": 1, "command": "svi", "finished": False}))
    tensors, metadata = load_tensors(Path("runs/prior-ms/prior.safetensors"))
    next(iter(tensors.values())).add_(0.01)
    save_tensors(Path("runs/prior-ms/prior.safetensors"), tensors, metadata)
    result = command(*arguments, "--resume")
    assert result.exit_code == 2 and "learned_from.json: cannot continue" in result.stderr
