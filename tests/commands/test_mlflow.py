"""Runs in MLflow with a real client on a local store, and the error if it is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dwp_pyro.training import tracking
from tests.world import TINY, error_line


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "arguments", [("svi", "--n", 2), ("finetune", "--n", 2), ("fit-prior",), ("fit-prior", "--kernels", "k.npy")]
)
def test_without_mlflow_no_run_starts(command, in_world, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    result = command(*arguments, "--mlflow", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "pip install dwp-pyro[mlflow]" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_in_mlflow_as_in_its_folder(command, copy_of_world):
    """MLflow gets settings, all of metrics.jsonl and the files; an interrupted and resumed run is one run."""
    import mlflow  # not before `_no_server` and pytest's mark of a test: its import starts telemetry elsewhere

    run = Path("runs/new")
    arguments = ("svi", "--n", 2, *TINY, "--members", 2, "--out", run, "--mlflow")
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    store = mlflow.MlflowClient("runs/mlruns")
    (found,) = store.search_runs(["0"])
    assert found.info.status == "FINISHED" and found.info.run_name == "new"
    assert found.data.params["prior"] == "isotropic" and found.data.params["widths"] == "[2, 3, 4, 5]"
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        stage, step = line.pop("stage"), line.pop("step")
        for name, value in line.items():
            history = {each.step: each.value for each in store.get_metric_history(found.info.run_id, f"{stage}/{name}")}
            assert history[step] == pytest.approx(value), name
    files = {each.path for each in store.list_artifacts(found.info.run_id)}
    assert {"posterior.safetensors", "config.yaml", "split.json", "metrics.jsonl"} <= files
    assert not any("checkpoint" in name for name in files)

    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"finished": False}))
    assert command(*arguments, "--resume").exit_code == 0
    (again,) = store.search_runs(["0"])
    assert again.info.run_id == found.info.run_id


def test_a_prior_is_in_mlflow(command, in_world, tmp_path, monkeypatch):
    """A prior and its card go to the user's own store."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mine"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    bank = "runs/prior-ms/kernels.safetensors"
    result = command("fit-prior", "--kernels", bank, "--family", "gaussian", "--out", tmp_path / "p", "--mlflow")
    assert result.exit_code == 0, result.output
    store = mlflow.MlflowClient(str(tmp_path / "mine"))
    (found,) = store.search_runs(["0"])
    assert {"prior.json", "prior.safetensors", "card.md"} <= {a.path for a in store.list_artifacts(found.info.run_id)}


def test_a_store_error_is_reported_in_one_line(command, in_world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "file"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = command("finetune", "--n", 2, *TINY, "--out", tmp_path / "run", "--mlflow")
    assert result.exit_code == 2
    line = error_line(result.stderr)
    assert line.startswith("Error: MLflow: ") and line.endswith("; fix this and resume, or resume without MLflow")
