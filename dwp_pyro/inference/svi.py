"""The SVI loop: annealing, progress, checkpoint, resume. Every arm is trained by it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dwp_pyro.data.transforms import Patches
from dwp_pyro.errors import Interrupted, RunError
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.progress import progress
from dwp_pyro.signals import stop_signals
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = ["OneOptimizer", "Plan", "optimise", "step_seed", "steps_done"]

_CHECKPOINT_INTERVAL = 60.0  # seconds
_LOG_EVERY = 10  # steps
_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW, for each parameter that has had a gradient


@dataclass(frozen=True)
class Plan:
    """How to optimise. Rates are functions of the step alone, so that a resumed run goes on as if uninterrupted.

    Args:
        steps: optimisation steps.
        learning_rate: step → learning rate of AdamW.
        beta: step → weight of the KL term.
        weight_decay: of AdamW, on the network's deterministic parameters.
        estimator: "shared" or "local".
        kernel_part: of `BatchedMeanFieldELBO`.
        seed: of the weight samples; step t draws with (seed, t).
        validate_every: steps between two calls of `validate`.
    """

    steps: int
    learning_rate: Callable[[int], float]
    seed: int
    beta: Callable[[int], float] = lambda step: 1.0
    weight_decay: float = 0.0
    estimator: str = "shared"
    kernel_part: float = 1.0
    validate_every: int = 100


class OneOptimizer(PyroOptim):
    """Lets SVI drive one torch optimiser over all parameters, instead of one a tensor: its state can be saved.

    SVI hands over the parameters it saw as a set, without order; the optimiser knows its own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def optimise(
    model: SegmentationModel,
    guide: MeanFieldNormal | None,
    patches: Patches,
    batch_size: int,
    plan: Plan,
    checkpoint: Path,
    *,
    description: str,
    log: Callable[[int, Mapping[str, float]], None],
    validate: Callable[[], Mapping[str, float]] = dict,
    at_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Maximise the ELBO of a model under a guide; of a model without sites (guide None), the likelihood.

    The parameters are trained in place. If `checkpoint` exists the loop goes on from there, to the same
    result, bit by bit on the same CPU with as many threads.

    Args:
        model: the generative program, on its device.
        guide: on the same device.
        patches: `plan.steps` × `batch_size` of them.
        batch_size: patches a step.
        plan: rates, estimator, seeds.
        checkpoint: file that is written now and then, on SIGINT and SIGTERM, and at the end.
        description: of the progress bar.
        log: called with the step and its figures, every ten steps and after each validation.
        validate: figures to log every `plan.validate_every` steps and at the last.
        at_step: called after step t = 1, 2, … (before the checkpoint of that step is written).

    Raises:
        Interrupted: after a signal, with the checkpoint saved.
        RunError: if the checkpoint does not fit, or the loss is NaN or infinite.
    """
    keep_freed_memory()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if guide is not None:
        parameters |= {f"guide.{name}": p for name, p in guide.named_parameters()}
    decay = {True: plan.weight_decay, False: 0.0}
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith("network.") is ours], "weight_decay": rate}
        for ours, rate in decay.items()
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)
    start = _restore(checkpoint, parameters, optimizer)
    device = next(iter(parameters.values())).device

    def scaled_guide(*args: Any) -> Any:
        with poutine.scale(scale=model.beta):
            return guide(*args) if guide is not None else {}

    elbo = BatchedMeanFieldELBO(plan.kernel_part)
    local = plan.estimator == "local" and guide is not None
    rest = Subset(patches, range(start * batch_size, plan.steps * batch_size))
    loader = DataLoader(
        rest,
        batch_size,
        num_workers=_workers(device),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )
    model.train()
    saved = time.monotonic()
    with (
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        stop_signals() as stopped,
        progress(description, plan.steps, start) as advance,
    ):
        svi = SVI(model, scaled_guide, OneOptimizer(optimizer), elbo)
        batches = iter(loader)
        for step in range(start, plan.steps):
            image, label, brain, brain_voxels = (part.to(device, non_blocking=True) for part in next(batches))
            model.beta = plan.beta(step)
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step)
            torch.manual_seed(step_seed(plan.seed, step))
            try:
                with LocalReparameterization(guide.posterior) if local and guide is not None else nullcontext():
                    loss = svi.step(image, label, brain, brain_voxels)
            except torch.OutOfMemoryError as problem:
                raise RunError(
                    f"{checkpoint.parent}: the device ran out of memory; try a smaller --patch or --batch-size"
                ) from problem
            if not math.isfinite(loss):
                raise RunError(
                    f"{checkpoint.parent}: the loss became {loss} at step {step + 1}; the checkpoint before it is "
                    "kept. Try a lower --learning-rate"
                )
            done = step + 1
            figures: dict[str, float] = {}
            if done % _LOG_EVERY == 0 or done == plan.steps:
                figures |= {"loss": loss, **elbo.terms, "beta": model.beta, "learning_rate": plan.learning_rate(step)}
            if done % plan.validate_every == 0 or done == plan.steps:
                figures |= validate()
                model.train()
            if figures:
                log(done, figures)
            at_step(done)
            if stopped() or done == plan.steps or time.monotonic() - saved > _CHECKPOINT_INTERVAL:
                _save(checkpoint, done, parameters, optimizer)
                saved = time.monotonic()
            # Apart: their sum rises while β does, and looks like a training that goes wrong.
            likelihood, divergence = elbo.terms["log_likelihood"], elbo.terms["divergence"] / model.beta
            advance(f"log-likelihood {likelihood:.4g}" + (f", KL {divergence:.4g}" if guide is not None else ""))
            if stopped():  # after the last step too: other trainings may follow
                raise Interrupted(stopped())


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for each step, far from those of neighbouring seeds."""
    return (seed * 1_000_003 + step + 1) % 2**63


def steps_done(checkpoint: Path) -> int:
    """The steps behind a checkpoint; 0 if there is none.

    Raises:
        RunError: if the file is no checkpoint.
    """
    return _steps(checkpoint, load_tensors(checkpoint)[1]) if checkpoint.exists() else 0


def _steps(checkpoint: Path, metadata: Mapping[str, Any]) -> int:
    step = metadata.get("step")
    if not isinstance(step, int) or step < 0:
        raise RunError(f"{checkpoint}: is not a checkpoint; give --overwrite to start again")
    return step


def _workers(device: torch.device) -> int:
    # On a CPU the transforms take a hundredth of a step; beside a GPU they are hidden behind it.
    return 0 if device.type == "cpu" else 2


def _leave_signals_to_the_parent(worker: int) -> None:
    # A terminal or a scheduler signals the whole process group; a worker that died would take the checkpoint along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _save(path: Path, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    save_tensors(path, tensors, {"step": step})


def _restore(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint, if there is one, and return the steps done."""
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path)
    if {name for name in tensors if name.startswith("value/")} != {f"value/{name}" for name in parameters}:
        raise RunError(f"{path}: is a checkpoint of another network; give --overwrite to start again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            of = {key.removesuffix(f"/{name}"): tensor for key, tensor in tensors.items() if key.endswith(f"/{name}")}
            if of.keys() - {"value"} not in (set(), _STATE) or any(
                tensor.shape != (() if key == "step" else parameter.shape)
                or tensor.dtype != (torch.float32 if key == "step" else parameter.dtype)
                for key, tensor in of.items()
            ):
                raise RunError(f"{path}: '{name}' has another shape or format; give --overwrite to start again")
            parameter.copy_(of.pop("value"))
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in of.items()}
    return _steps(path, metadata)
