"""The SVI loop: its optimization, interruption and resume with the same bits, and divergence."""

import itertools
import logging
import math
import os
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import AdamW
from pyro.poutine.messenger import Messenger
from torch.testing import assert_close
from torch.utils.data import Subset

from dwp_pyro.data.case import Scan
from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.data.preprocessing import Preprocessing
from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.checkpoint import steps_reported
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.loop import fit
from dwp_pyro.inference.optimization import GraphedLoss
from dwp_pyro.inference.schedule import TrainingSchedule, step_seed
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.priors.blocks import kernel_sites
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.runtime.errors import Diverged, Interrupted, RunError
from dwp_pyro.runtime.tensors import load_tensors

STEPS = 6
_SEEDS = itertools.count(100)


@pytest.fixture(scope="module")
def patches() -> PatchDataset:
    rng = np.random.default_rng(0)
    brain_mask = np.ones((20, 20, 20), bool)
    label = np.zeros(brain_mask.shape, np.int16)
    label[6:13, 6:13, 6:13] = 1
    images = rng.normal(5, 1, (1, *brain_mask.shape)).astype(np.float32) + 3 * label
    example = Preprocessing(None)(Scan("c", images, brain_mask, label, np.eye(4), Path("c.nii")), [frozenset({1})])
    return PatchDataset([example], (16, 16, 16), 0, 2 * STEPS)


def build(bayesian: bool, l2_sp: float = 0.0) -> tuple[SegmentationModel, MeanFieldNormal | None]:
    torch.manual_seed(1)
    network = ResidualUNet3d(1, 2, (2, 2, 3, 3))
    guide = None
    if bayesian:
        priors = {site: make_prior("normal", site, weight) for site, weight in kernel_sites(network).items()}
        guide = MeanFieldNormal(bayesianize(network, priors), 0.01)
    return SegmentationModel(network, "dice-ce", 1, l2_sp=l2_sp), guide


def send_to_this_process(signum: int) -> None:
    os.kill(os.getpid(), signum)


def send_to_the_group(signum: int) -> None:
    """Signal the process group, as a scheduler or a terminal does."""
    os.killpg(0, signum)


def run(
    patches,
    checkpoint,
    bayesian=True,
    estimator="weight-sample",
    stop_at=None,
    learning_rate=1e-2,
    l2_sp=0.0,
    steps=STEPS,
    stop_in_log=None,
    logged=None,
    send=send_to_this_process,
):
    model, guide = build(bayesian, l2_sp)
    # Every run starts from another state of the global generators, on which nothing may depend.
    for seed_globally in (random.seed, np.random.seed, torch.manual_seed):
        seed_globally(next(_SEEDS))
    schedule = TrainingSchedule(
        steps=steps,
        learning_rate=lambda step: learning_rate,
        seed=0,
        beta=lambda step: (step + 1) / STEPS,
        weight_decay=0.1,
        estimator=estimator,
        validate_every=2,
    )
    logged = [] if logged is None else logged

    def log(step: int, metrics: Mapping[str, float]) -> None:
        if step == stop_in_log:
            send(signal.SIGINT)
        logged.append((step, dict(metrics)))

    def at_step(step: int) -> None:
        if step == stop_at:
            send(signal.SIGTERM)

    fit(
        model,
        guide,
        patches,
        2,
        schedule,
        checkpoint,
        description="test",
        log=log,
        validate=lambda: {"validation_dice": 0.5},
        at_step=at_step,
    )
    state = {f"network.{k}": v for k, v in model.network.state_dict().items()}
    if guide is not None:
        state |= {f"guide.{k}": v for k, v in guide.state_dict().items()}
    return state, logged


@dataclass(frozen=True)
class UninterruptedRun:
    """Parameters, records and checkpoint of a run."""

    state: dict[str, torch.Tensor]
    logged: list[tuple[int, dict[str, float]]]
    checkpoint: Path


@pytest.fixture(scope="module")
def uninterrupted(patches, tmp_path_factory) -> dict[bool, UninterruptedRun]:
    """Bayesian or not → the run."""
    files = {bayesian: tmp_path_factory.mktemp("run") / "checkpoint.safetensors" for bayesian in (True, False)}
    return {bayesian: UninterruptedRun(*run(patches, file, bayesian), file) for bayesian, file in files.items()}


@pytest.mark.parametrize("bayesian", [True, False])
@pytest.mark.parametrize("stop_at", range(1, STEPS + 1))
def test_a_resumed_run_gives_the_same_bits(patches, uninterrupted, tmp_path, bayesian, stop_at):
    whole = uninterrupted[bayesian].state
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted) as caught:
        run(patches, checkpoint, bayesian, stop_at=stop_at)
    assert caught.value.signum == signal.SIGTERM
    assert steps_reported(checkpoint) == stop_at - 1  # the signal arrives while the step is reported
    resumed, _ = run(patches, checkpoint, bayesian)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_signal_does_not_interrupt_logging(patches, tmp_path):
    """Otherwise TensorBoard's queue would keep its lock and never close."""
    checkpoint, logged = tmp_path / "checkpoint.safetensors", []
    with pytest.raises(Interrupted) as caught:
        run(patches, checkpoint, stop_in_log=4, logged=logged)
    assert caught.value.signum == signal.SIGINT and caught.value.args[0].endswith("checkpoint saved")
    assert [step for step, _ in logged] == [2, 4]
    assert steps_reported(checkpoint) == 3


def test_content_of_a_checkpoint(uninterrupted):
    """Values and optimizer state of every parameter, and the step."""
    state = uninterrupted[True].state
    tensors, metadata = load_tensors(uninterrupted[True].checkpoint)
    assert metadata["step"] == STEPS and metadata["unreported"] is None
    values = {name.removeprefix("value/"): tensor for name, tensor in tensors.items() if name.startswith("value/")}
    assert len(values) > 10
    for name, value in values.items():
        assert torch.equal(value, state[name]), name
        assert tensors[f"step/{name}"] == STEPS
        for moment in ("exp_avg", "exp_avg_sq"):
            assert tensors[f"{moment}/{name}"].shape == value.shape and tensors[f"{moment}/{name}"].any(), name


def test_every_step_draws_other_weights(patches, tmp_path, monkeypatch):
    draws = []
    draw = MeanFieldNormal.forward

    def forward(self, *args):
        weights = draw(self, *args)
        draws.append(torch.cat([(w - w.mean()).detach().flatten() for w in weights.values()]))
        return weights

    monkeypatch.setattr(MeanFieldNormal, "forward", forward)
    run(patches, tmp_path / "checkpoint.safetensors", learning_rate=0.0)
    assert len(draws) == STEPS and len(draws[0]) > 1000
    assert torch.cat(draws).unique().numel() > 0.99 * STEPS * len(draws[0])


def test_the_learning_rate_rises_in_the_first_tenth_of_the_steps_or_fifty():
    for steps, length in ((100, 10), (2000, 50)):
        schedule = TrainingSchedule(steps, lambda step: 2.0, seed=0)
        assert schedule.warmed_up_rate(0) == pytest.approx(2 / length)
        assert schedule.warmed_up_rate(length // 2 - 1) == pytest.approx(1.0)
        assert schedule.warmed_up_rate(length - 1) == schedule.warmed_up_rate(steps - 1) == 2.0


def test_five_steps_are_those_of_stock_pyro(patches, tmp_path):
    """`pyro.infer.SVI` and `TraceMeanField_ELBO`, with an optimizer per tensor, on the same draws."""
    data = [tuple(part.double() for part in patches[i]) for i in range(10)]

    def double_precision() -> tuple[SegmentationModel, MeanFieldNormal]:
        model, guide = build(bayesian=True)
        return model.double(), guide.double()

    def parameters(*modules: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for each in modules for name, p in each.named_parameters()}

    start = parameters(*double_precision())
    betas = (0.9, 0.95)
    scales, shifts, rest = {"lr": 50e-3, "eps": 1.0, "betas": betas}, {"lr": 12.5e-3, "betas": betas}, {"lr": 1e-3}

    def settings(name: str) -> dict[str, object]:
        chosen = scales if "log_scales" in name else shifts if "shifts" in name else rest
        return {**chosen, "weight_decay": 0.0 if name.startswith("guide") else 0.1}

    model, guide = double_precision()
    svi = SVI(model, guide, AdamW(settings), TraceMeanField_ELBO())
    for step in range(5):
        torch.manual_seed(step_seed(0, step))
        svi.step(*(torch.stack(parts) for parts in zip(*data[2 * step : 2 * step + 2], strict=True)))
    stock = parameters(model, guide)

    pyro.clear_param_store()
    model, guide = double_precision()
    schedule = TrainingSchedule(5, lambda step: 1e-3, seed=0, weight_decay=0.1)
    fit(model, guide, data, 2, schedule, tmp_path / "c", description="", log=lambda step, metrics: None)
    fitted = parameters(model, guide)
    assert fitted.keys() == stock.keys()
    for name, parameter in fitted.items():
        assert (parameter != start[name]).any()
        # Learning rates are float32 tensors.
        assert_close(parameter - start[name], stock[name] - start[name], rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_workers_give_the_same_bits_and_leave_signals_to_the_parent(patches, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("dwp_pyro.inference.loop._workers", lambda device: 2)
    with_workers, _ = run(patches, tmp_path / "b.safetensors")
    assert all(torch.equal(tensor, with_workers[name]) for name, tensor in uninterrupted[True].state.items())
    checkpoint = tmp_path / "c.safetensors"

    def stop_a_group() -> None:
        """Stop a run in a new process group, which consists of it and its data loaders."""
        os.setpgrp()
        try:
            run(patches, checkpoint, stop_at=2, send=send_to_the_group)
        except Interrupted as stop:
            sys.exit(128 + stop.signum)

    process = get_context("fork").Process(target=stop_a_group)
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert steps_reported(checkpoint) == 1


def test_a_reverse_model_that_is_not_frozen_is_trained(patches, tmp_path):
    vae = KernelVAE((3, 3, 3), 2, (4,))
    torch.nn.init.normal_(vae.encoder[-1].weight, std=0.1)
    prior = KernelPrior("dwp", {"all": vae}, {"all": BlockInfo((ANY_SITE,), 1)}).requires_grad_(False)
    vae.encoder.requires_grad_(True)
    network = ResidualUNet3d(1, 2, (2, 2, 3, 3))
    sites = {site: make_prior("dwp", site, weight, prior) for site, weight in kernel_sites(network).items()}
    guide = MeanFieldNormal(bayesianize(network, sites), 0.01)
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    schedule = TrainingSchedule(steps=2, learning_rate=lambda step: 1e-2, seed=0)
    fit(
        SegmentationModel(network, "dice-ce", 1, prior_modules={"kernel_prior": prior}),
        guide,
        patches,
        1,
        schedule,
        tmp_path / "c.safetensors",
        description="test",
        log=lambda step, metrics: None,
    )
    moved = {name for name, tensor in prior.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".encoder." in name for name in moved)


def test_every_parameter_moves(uninterrupted):
    model, guide = build(True)
    before = {f"network.{k}": v.clone() for k, v in model.network.state_dict().items()}
    before |= {f"guide.{k}": v.detach().clone() for k, v in guide.named_parameters()}
    after = uninterrupted[True].state
    assert not [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


def test_the_loss_is_logged_with_its_parts(uninterrupted):
    logged = uninterrupted[True].logged
    assert [step for step, _ in logged] == [2, 4, 6]
    last = logged[-1][1]
    assert last["beta"] == 1
    assert last["validation_dice"] == 0.5
    assert last["loss"] == pytest.approx(last["kl"] - last["log_likelihood"] - last["log_prior"], rel=1e-5)


def test_the_local_estimator_gives_another_run(patches, uninterrupted, tmp_path):
    weight_sample = uninterrupted[True].state
    local, _ = run(patches, tmp_path / "b.safetensors", estimator="local")
    assert not torch.equal(weight_sample["guide.shifts.input/weight"], local["guide.shifts.input/weight"])
    assert all(torch.isfinite(tensor).all() for tensor in local.values())


def test_a_deterministic_network_learns(patches, uninterrupted):
    model, _ = build(False)
    image, label, brain_mask = (torch.stack(parts) for parts in zip(*(patches[i] for i in range(4)), strict=True))

    def loss(network: torch.nn.Module) -> float:
        with torch.no_grad(), pyro.poutine.block():
            return -float(
                pyro.poutine.trace(SegmentationModel(network, "dice-ce", 4))
                .get_trace(image, label, brain_mask)
                .log_prob_sum()
            )

    trained = ResidualUNet3d(1, 2, (2, 2, 3, 3))
    trained.load_state_dict({name.removeprefix("network."): w for name, w in uninterrupted[False].state.items()})
    assert loss(trained) < loss(model.network)


def test_l2_sp_keeps_a_run_near_its_start_and_a_resumed_run_gives_the_same_bits(patches, uninterrupted, tmp_path):
    """The center of L2-SP in a resumed run is the start of the whole run."""
    start = dict(build(False)[0].network.state_dict())

    def distance(state: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((state[f"network.{name}"] - w).square().sum()) for name, w in start.items()))

    held, _ = run(patches, tmp_path / "l2_sp.safetensors", bayesian=False, l2_sp=1e8)
    assert distance(held) < 0.3 * distance(uninterrupted[False].state)
    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Interrupted):
        run(patches, checkpoint, bayesian=False, l2_sp=1e8, stop_at=3)
    resumed, _ = run(patches, checkpoint, bayesian=False, l2_sp=1e8)
    assert all(torch.equal(w, resumed[name]) for name, w in held.items())


class Spoiled(PatchDataset):
    """Patches that are NaN in some steps, with a batch size of two."""

    def __init__(self, patches: PatchDataset, steps: range | list[int], length: int = STEPS) -> None:
        super().__init__(patches.examples, (16, 16, 16), patches.seed, 2 * length)
        self.spoiled = {step - 1 for step in steps}

    def __getitem__(self, index):
        image, *rest = super().__getitem__(index)
        return (image * math.nan if index // 2 in self.spoiled else image, *rest)


def stopped_at(step, patches, checkpoint, bayesian=True, steps=STEPS):
    """Return tensors and counts of the checkpoint of a run that a signal stopped after a step."""
    with pytest.raises(Interrupted):
        run(patches, checkpoint, bayesian, stop_at=step, steps=steps)
    tensors, metadata = load_tensors(checkpoint)
    return tensors, {name: metadata[name] for name in ("step", "skipped", "in_a_row")}


@pytest.mark.parametrize("bayesian", [True, False])
def test_a_step_without_a_finite_loss_is_skipped_and_counted(patches, tmp_path, bayesian):
    """It changes neither parameters nor moments, and the next step is taken."""
    before, counts = stopped_at(2, patches, tmp_path / "a.safetensors", bayesian)
    assert counts == {"step": 2, "skipped": 0, "in_a_row": 0}
    spoiled = Spoiled(patches, [3])
    after, counts = stopped_at(3, spoiled, tmp_path / "b.safetensors", bayesian)
    assert counts == {"step": 3, "skipped": 1, "in_a_row": 1}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    _, counts = stopped_at(4, spoiled, tmp_path / "c.safetensors", bayesian)
    assert counts == {"step": 4, "skipped": 1, "in_a_row": 0}


def test_a_resumed_run_with_skipped_steps_gives_the_same_bits(patches, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dwp_pyro")
    spoiled = Spoiled(patches, [2, 3, 6])
    whole, logged = run(spoiled, tmp_path / "whole.safetensors")
    assert [metrics["skipped_steps"] for step, metrics in logged if "skipped_steps" in metrics] == [3]
    assert "loss" not in logged[-1][1] and all(math.isfinite(value) for value in logged[-1][1].values())
    assert ", 3 steps skipped" in caplog.text
    checkpoint = tmp_path / "c.safetensors"
    stopped_at(2, spoiled, checkpoint)
    resumed, again = run(spoiled, checkpoint)
    assert again[-1] == logged[-1]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_ten_skipped_steps_in_a_row_stop_with_the_last_step_that_was_taken(patches, tmp_path):
    before, _ = stopped_at(2, patches, tmp_path / "a.safetensors", steps=20)
    checkpoint = tmp_path / "run" / "b.safetensors"
    message = (
        "run: the loss or its gradient was not finite in 10 steps in a row, to step 12, at the learning rate 0.01; the "
        "checkpoint of step 2 is kept"
    )
    with pytest.raises(Diverged, match=message):
        run(Spoiled(patches, range(3, 21), 20), checkpoint, steps=20)
    kept, metadata = load_tensors(checkpoint)
    assert metadata["step"] == 2 and kept.keys() == before.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())
    with pytest.raises(RunError, match="to step 12, .*; the checkpoint of step 2 is kept"):
        run(Spoiled(patches, range(3, 21), 20), checkpoint, steps=20)
    _, logged = run(Spoiled(patches, [1, *range(3, 12), *range(13, 21)], 20), tmp_path / "c.safetensors", steps=20)
    assert logged[-1][1]["skipped_steps"] == 18  # never ten in a row


def test_steps_in_a_row_are_counted_across_a_stop(patches, tmp_path):
    checkpoint = tmp_path / "c.safetensors"
    spoiled = Spoiled(patches, range(1, 21), 20)
    stopped_at(4, spoiled, checkpoint)
    with pytest.raises(RunError, match="to step 10, .*; nothing is kept"):
        run(spoiled, checkpoint, steps=20)


def test_parameters_that_are_not_finite_are_not_saved(patches, tmp_path):
    """A NaN learning rate makes the weights NaN in a step whose loss is finite."""
    checkpoint = tmp_path / "c.safetensors"
    for steps in (1, 20):
        with pytest.raises(Diverged, match=r"c.safetensors: not written, because 'value/"):
            run(patches if steps == 1 else Spoiled(patches, [], 20), checkpoint, learning_rate=math.nan, steps=steps)
        assert not checkpoint.exists()


def test_the_checkpoint_of_another_network_is_rejected(patches, tmp_path):
    checkpoint = tmp_path / "c.safetensors"
    run(patches, checkpoint, bayesian=False)
    with pytest.raises(RunError, match="another network"):
        run(patches, checkpoint, bayesian=True)


def test_the_parameter_store_is_left_as_it_was(patches, tmp_path):
    pyro.param("mine", torch.tensor(3.0))
    run(patches, tmp_path / "c.safetensors")
    assert list(pyro.get_param_store().keys()) == ["mine"]


class ParameterNames(Messenger):
    """Records the names of registered parameters."""

    def __init__(self):
        super().__init__()
        self.names = []

    def _pyro_param(self, message):
        self.names.append(message["name"])


def test_the_guide_registers_its_parameters_when_called_but_not_in_the_loop(patches, tmp_path):
    with ParameterNames() as registered:
        run(patches, tmp_path / "c.safetensors", steps=1)
    assert registered.names and not any(name.startswith("guide.") for name in registered.names)
    with ParameterNames() as registered:
        MeanFieldNormal({"0.weight": torch.zeros(2, 1, 3, 3, 3)})()
    assert registered.names == ["guide.shifts$$$0/weight", "guide.log_scales$$$0/weight"]


def test_a_graphed_loss_is_that_of_the_elbo(patches, monkeypatch):
    """Without a GPU: each batch is copied to one buffer, loss and gradients are returned, other shapes are rejected."""
    monkeypatch.setattr("dwp_pyro.inference.optimization.GraphedCallable", lambda function, device: function)
    batches = [[part[None] for part in patches[number]] for number in range(2)]
    found = []
    with pyro.validation_enabled(False):
        for graphed in (True, False):
            model, guide = build(bayesian=True)
            parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
            elbo = MeanFieldELBO()
            loss_and_grads = GraphedLoss(elbo, parameters) if graphed else elbo.loss_and_grads
            for batch in batches:
                torch.manual_seed(0)
                loss = float(loss_and_grads(model, guide, *batch))
                found.append((loss, [p.grad for p in parameters]))
                for parameter in parameters:
                    parameter.grad = None
    for (loss, ours), (expected, stock) in zip(found[:2], found[2:], strict=True):
        assert loss == expected
        assert all(torch.equal(one, other) for one, other in zip(ours, stock, strict=True))
    assert found[0][0] != found[1][0]
    with pytest.raises(ValueError, match="one shape"):
        graphed_loss = GraphedLoss(elbo, parameters)
        for count in (1, 2):
            graphed_loss(model, guide, *(torch.cat([part] * count) for part in batches[0]))


def test_beta_weighs_the_divergence_of_each_step(patches, tmp_path):
    """One step from the same start at the same draw: half of β halves the KL in the loss only."""
    logged = []
    for beta in (1.0, 0.5):
        model, guide = build(bayesian=True)
        schedule = TrainingSchedule(1, lambda step: 1e-3, seed=0, beta=lambda step, beta=beta: beta)
        checkpoint = tmp_path / f"{beta}.safetensors"
        one = Subset(patches, range(2))
        fit(
            model, guide, one, 2, schedule, checkpoint, description="", log=lambda step, metrics: logged.append(metrics)
        )
    whole, half = logged
    assert (half["kl"], half["log_likelihood"]) == (whole["kl"], whole["log_likelihood"])
    assert whole["loss"] - half["loss"] == pytest.approx(0.5 * whole["kl"], rel=1e-4)


def test_a_replay_sets_its_gradients_again(patches, monkeypatch):
    """The guard sets them to None after a step, while a replay writes to the same tensors, as for the terms."""
    monkeypatch.setattr("dwp_pyro.inference.optimization.GraphedCallable", lambda function, device: cache(function))
    model, guide = build(bayesian=True)
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    elbo = MeanFieldELBO()
    loss_and_grads = GraphedLoss(elbo, parameters)
    batch = [part[None] for part in patches[0]]
    with pyro.validation_enabled(False):
        first = loss_and_grads(model, guide, *batch)
        gradients, terms = [p.grad for p in parameters], elbo.terms
        for parameter in parameters:
            parameter.grad = None
        elbo.terms = {}
        assert loss_and_grads(model, guide, *batch) is first
    assert all(p.grad is gradient is not None for p, gradient in zip(parameters, gradients, strict=True))
    assert elbo.terms is terms
