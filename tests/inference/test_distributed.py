"""Training in several processes: the mean of their gradients, one step to stop at, and a process that is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.testing import assert_close
from torch.utils.data import Dataset

from dwp_pyro.data.case import Scan
from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.data.preprocessing import Preprocessing
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.checkpoint import steps_reported
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.loop import fit
from dwp_pyro.inference.schedule import TrainingSchedule, step_seed
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import kernel_sites
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.runtime.distributed import _read_files
from dwp_pyro.runtime.errors import Interrupted, ProcessLost
from dwp_pyro.runtime.tensors import load_tensors

STEPS, BATCH, RATE = 4, 2, 1e-2
SCHEDULE = TrainingSchedule(STEPS, lambda step: RATE, seed=5, beta=lambda step: (step + 1) / STEPS, validate_every=2)


class DoublePatches(Dataset):
    """Patches in double precision; the process that reads the one of number `interrupted_at` receives SIGTERM."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.interrupted_at = interrupted_at
        label = np.zeros((20, 20, 20), np.int16)
        label[6:13, 6:13, 6:13] = 1
        images = np.random.default_rng(0).normal(5, 1, (1, 20, 20, 20)).astype(np.float32) + 3 * label
        scan = Scan("c", images, np.ones(label.shape, bool), label, np.eye(4), Path("c.nii"))
        self.patches = PatchDataset([Preprocessing(None)(scan, [frozenset({1})])], (16, 16, 16), 0, 100)

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index):
        if index == self.interrupted_at:
            os.kill(os.getpid(), signal.SIGTERM)
        image, label, mask = self.patches[index]
        return image.double(), label, mask.double()


def build(bayesian: bool) -> tuple[SegmentationModel, MeanFieldNormal | None]:
    torch.manual_seed(1)
    network = ResidualUNet3d(1, 2, (2, 2, 3, 3)).double()
    guide = None
    if bayesian:
        priors = {site: make_prior("normal", site, weight) for site, weight in kernel_sites(network).items()}
        guide = MeanFieldNormal(bayesianize(network, priors), 0.01).double()
    return SegmentationModel(network, "dice-ce", 1), guide


def train(
    folder: Path, bayesian: bool, at_step: Callable[[int], None] = lambda step: None, interrupted_at: int | None = None
) -> None:
    """Train from the checkpoint in the folder."""
    model, guide = build(bayesian)
    fit(
        model,
        guide,
        DoublePatches(interrupted_at),
        BATCH,
        SCHEDULE,
        folder / "checkpoint.safetensors",
        description="test",
        log=lambda step, metrics: (folder / f"metrics{step}.json").write_text(json.dumps(dict(metrics))),
        at_step=at_step,
    )


def _process(
    number: int,
    count: int,
    folder: Path,
    bayesian: bool,
    at_step: Callable[..., None] | None,
    interrupted_at: int | None,
) -> None:
    torch.set_num_threads(1)
    file = (folder / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=file, rank=number, world_size=count)
    own = folder if number == 0 else folder / str(number)
    own.mkdir(exist_ok=True)
    outcome = "finished"
    try:
        train(own, bayesian, (lambda step: at_step(number, step)) if at_step else (lambda step: None), interrupted_at)
    except (Interrupted, ProcessLost) as problem:
        outcome = f"{type(problem).__name__}: {problem}"
    (folder / f"outcome{number}").write_text(outcome)
    os._exit(0)  # without waiting for lost processes


def run(
    folder: Path,
    count: int,
    bayesian: bool = True,
    at_step: Callable[..., None] | None = None,
    interrupted_at: int | None = None,
) -> list[str]:
    """Train in several processes; return what each came to, "" for one that was killed."""
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    context = get_context("spawn")
    processes = [
        context.Process(target=_process, args=(n, count, folder, bayesian, at_step, interrupted_at))
        for n in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None
    outcomes = [folder / f"outcome{number}" for number in range(count)]
    return [path.read_text() if path.exists() else "" for path in outcomes]


def reference(count: int, bayesian: bool) -> tuple[dict[str, torch.Tensor], float]:
    """Return the parameters after steps whose gradient is the mean over sub-batches, each with its weight sample.

    And the mean loss of the last step.
    """
    model, guide = build(bayesian)
    parameters = dict(model.named_parameters())
    groups: list[dict] = [{"params": list(parameters.values()), "lr": RATE}]
    if guide is not None:
        parameters |= {f"guide.{name}": parameter for name, parameter in guide.named_parameters()}
        of_guide = dict(guide.named_parameters())
        shifts, scales = ([p for n, p in of_guide.items() if n.startswith(kind)] for kind in ("shifts", "log_scales"))
        groups.append({"params": shifts, "lr": 12.5 * RATE, "betas": (0.9, 0.95)})
        groups.append({"params": scales, "lr": 50 * RATE, "betas": (0.9, 0.95), "eps": 1.0})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    patches = DoublePatches()
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * SCHEDULE.warmed_up_rate(step) / RATE
        elbo, losses = MeanFieldELBO(SCHEDULE.beta(step)), []
        for number in range(count):
            block = step * count + number
            samples = [patches[block * BATCH + index] for index in range(BATCH)]
            batch = [torch.stack(parts) for parts in zip(*samples, strict=True)]
            torch.manual_seed(step_seed(SCHEDULE.seed, block))
            draw = (lambda *parts: {}) if guide is None else guide.forward
            loss = elbo.differentiable_loss(model, draw, *batch) / count
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}, sum(losses)


@pytest.mark.parametrize(
    ("count", "bayesian"),
    [(2, True), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, False), (3, True), (3, False)])],
)
def test_processes_equal_one_that_averages_their_sub_batches(tmp_path, count, bayesian):
    assert run(tmp_path / "run", count, bayesian) == ["finished"] * count
    expected, loss = reference(count, bayesian)
    logged = json.loads((tmp_path / "run" / f"metrics{STEPS}.json").read_text())
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["kl"] * SCHEDULE.beta(STEPS - 1) - logged["log_likelihood"] == pytest.approx(loss, rel=1e-5)
    found, _ = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    other, _ = load_tensors(tmp_path / "run" / "1" / "checkpoint.safetensors")
    for name, parameter in expected.items():
        assert_close(found[f"value/{name}"], parameter, rtol=1e-5, atol=1e-8)
        assert torch.equal(found[f"value/{name}"], other[f"value/{name}"])


def test_resumed_processes_read_runs_in_folders_of_any_name(tmp_path):
    run_folder = tmp_path / "predictions" / "run"
    (run_folder / "predictions").mkdir(parents=True)
    for name in ("run.json", "checkpoint.safetensors", "predictions/a.json", ".lock"):
        (run_folder / name).write_text(name)
    assert _read_files(run_folder) == {name: name.encode() for name in ("run.json", "checkpoint.safetensors")}


def kill_second(number: int, step: int) -> None:
    if number == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_another_number_resumes(tmp_path):
    folder = tmp_path / "run"
    # Process 1 reads patches 2, 3 (step 0), 6, 7 (step 1), ...: it alone receives the signal, in step 1.
    assert run(folder, 2, interrupted_at=7) == ["Interrupted: stopped by SIGTERM, checkpoint saved"] * 2
    for own in (folder, folder / "1"):
        assert steps_reported(own / "checkpoint.safetensors") == 1
    saved = (folder / "checkpoint.safetensors").read_bytes()
    for number in (1, 2):
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "checkpoint.safetensors").write_bytes(saved)
    assert run(folder, 3) == ["finished"] * 3
    assert steps_reported(folder / "checkpoint.safetensors") == STEPS


@pytest.mark.slow
def test_a_killed_process_ends_all_with_the_last_step_saved(tmp_path):
    folder = tmp_path / "run"
    outcomes = run(folder, 2, at_step=kill_second)
    assert outcomes[1] == ""
    assert outcomes[0] == "ProcessLost: another process of this run has ended; the checkpoint of step 2 is saved"
    assert steps_reported(folder / "checkpoint.safetensors") == 2


def test_a_process_lost_after_a_step_leaves_its_report_to_the_resumed_run(tmp_path, monkeypatch):
    """Otherwise the snapshot of that step would be missing."""
    seen: list[int] = []

    def lost(signum: int) -> int:
        if seen == [1]:
            raise RuntimeError("[gloo] Connection closed by peer")
        return signum

    monkeypatch.setattr("dwp_pyro.inference.loop.any_signal", lost)
    with pytest.raises(ProcessLost, match="the checkpoint of step 2 is saved"):
        train(tmp_path, True, seen.append)
    monkeypatch.undo()
    train(tmp_path, True, seen.append)
    assert seen == [1, 2, 3, 4]


def test_all_parameters_take_part():
    """Nothing that is trained is left out of the average: DDP sees the parameters of model and guide."""
    from dwp_pyro.inference.optimization import _DistributedLoss

    model, guide = build(bayesian=True)
    loss = _DistributedLoss(MeanFieldELBO(), model, guide)
    assert isinstance(loss, nn.Module)
    of_loss = {id(parameter) for parameter in loss.parameters()}
    assert of_loss == {id(parameter) for parameter in (*model.parameters(), *guide.parameters())}
