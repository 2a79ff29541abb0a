"""The SVI loop: annealing, progress, checkpoint, resume. Every arm is trained by it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dwp_pyro.data.transforms import Batch, Patches
from dwp_pyro.errors import Interrupted, RunError
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.allocator import keep_freed_memory
from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO
from dwp_pyro.inference.cuda_graph import Recorded
from dwp_pyro.inference.finite_steps import MOST_IN_A_ROW, FiniteSteps
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.inference.moving_noise import MovingNoise
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.progress import progress
from dwp_pyro.signals import raise_signals, stop_signals
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = [
    "OneOptimizer",
    "Plan",
    "RecordedLoss",
    "optimise",
    "patch_loader",
    "pyro_svi",
    "step_seed",
    "steps_reported",
]

_CHECKPOINT_INTERVAL = 60.0  # seconds
_LOG_EVERY = 10  # steps
_STATE = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW, for each parameter that has had a gradient


@dataclass(frozen=True)
class Plan:
    """How to optimise. Rates are functions of the step alone, so that a resumed run goes on as if uninterrupted.

    Args:
        steps: optimisation steps.
        learning_rate: step → learning rate of AdamW.
        beta: step → weight of the KL term, above 0.
        weight_decay: of AdamW, on the network's deterministic parameters.
        estimator: "shared" or "local".
        kernel_part: of `BatchedMeanFieldELBO`.
        seed: of the weight samples; what step t draws follows from (seed, t).
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

    Args:
        take_step: over all parameters.
        elbo: that SVI maximises, whose last value tells whether the step is taken.
    """

    def __init__(self, take_step: FiniteSteps, elbo: BatchedMeanFieldELBO) -> None:
        self.take_step = take_step
        self.elbo = elbo

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        terms = self.elbo.terms
        self.take_step(terms["divergence"] - terms["log_likelihood"])


class RecordedLoss:
    """−ELBO and its gradients, recorded: for SVI in the place of `elbo.loss_and_grads`.

    Args:
        elbo: whose `beta`, if it ever changes, is a tensor on the GPU.
        parameters: that have gradients, on a GPU; who takes the step sets them to None, as `FiniteSteps` does.

    Raises:
        ValueError: if a batch has other shapes than the first.
    """

    def __init__(self, elbo: BatchedMeanFieldELBO, parameters: Sequence[nn.Parameter]) -> None:
        self.elbo = elbo
        self.parameters = parameters
        self._batch: list[Tensor] = []
        self._recorded: Recorded[tuple[Tensor, dict[str, Tensor], list[Tensor | None]]] | None = None

    def __call__(self, model: Any, guide: Any, *batch: Tensor) -> Tensor:
        """Model and guide are those of the first call."""
        if self._recorded is None:
            self._batch = [torch.empty_like(part) for part in batch]
            function = partial(_loss_and_gradients, self.elbo, self.parameters, model, guide, self._batch)
            self._recorded = Recorded(function, self.parameters[0].device)
        if [part.shape for part in batch] != [part.shape for part in self._batch]:
            raise ValueError("a recorded loss needs batches of one shape")
        for place, part in zip(self._batch, batch, strict=True):
            place.copy_(part)
        loss, self.elbo.terms, gradients = self._recorded()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss


# Not a method: a cycle would keep the memory of a graph until the garbage is collected.
def _loss_and_gradients(
    elbo: BatchedMeanFieldELBO, parameters: Sequence[nn.Parameter], model: Any, guide: Any, batch: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    loss = elbo.differentiable_loss(model, guide, *batch)
    loss.backward()
    return loss.detach(), elbo.terms, [parameter.grad for parameter in parameters]


def pyro_svi(
    model: SegmentationModel, guide: MeanFieldNormal | None, steps: FiniteSteps, elbo: BatchedMeanFieldELBO
) -> SVI:
    """Pyro's SVI over all parameters of one optimiser; on a GPU the loss, its gradients and the step are recorded."""
    # Not the guide's own call, which announces each of its parameters to Pyro at each step: the optimiser knows them.
    draw = (lambda *batch: {}) if guide is None else guide.forward
    program: tuple[Any, Any, OneOptimizer] = (model, draw, OneOptimizer(steps, elbo))
    if steps.parameters[0].device.type != "cuda":
        return SVI(*program, elbo)
    steps.record()
    return SVI(*program, elbo.loss, RecordedLoss(elbo, steps.parameters))


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

    The parameters are trained in place. A step whose loss or gradient is not finite is left out and counted
    (`skipped_steps` among the figures). If `checkpoint` exists the loop goes on from there, to the same
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
        RunError: if the checkpoint does not fit, or no step could be taken `MOST_IN_A_ROW` times in a row; the
            checkpoint is then that of the last step that was taken. If a parameter is NaN or infinite by itself, with
            the checkpoint before it.
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
    device = next(iter(parameters.values())).device
    # On the device, both: the graph of a step reads them there.
    learning_rate, beta = torch.zeros((), device=device), torch.ones((), device=device)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)
    steps = FiniteSteps(optimizer)
    start, unreported = _restore(checkpoint, parameters, steps)
    elbo = BatchedMeanFieldELBO(plan.kernel_part, beta)
    local = plan.estimator == "local" and guide is not None
    rest = Subset(patches, range(start * batch_size, plan.steps * batch_size))
    model.train()
    saved = time.monotonic()
    with (
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        stop_signals() as stopped,
        progress(description, plan.steps, start) as advance,
    ):

        def report(step: int, figures: Mapping[str, float]) -> None:
            # May take as long as many steps, so a signal ends it at once; the resumed run does it again. But not while
            # figures are logged: TensorBoard's queue would keep its lock, and never be closed.
            try:
                with raise_signals():
                    if stopped():
                        raise Interrupted(stopped())
                    validated = step % plan.validate_every == 0 or step == plan.steps
                    told = {**figures, **(validate() if validated else {})}
                model.train()
                if told:
                    log(step, told)
                with raise_signals():
                    if stopped():
                        raise Interrupted(stopped())
                    at_step(step)
            except Interrupted as stop:
                _save(checkpoint, step, parameters, steps, figures)
                raise Interrupted(stop.signum, saved=True) from None

        if unreported is not None:
            report(start, unreported)
        svi = pyro_svi(model, guide, steps, elbo)
        noise = MovingNoise(plan.seed, start)
        batches = iter(patch_loader(rest, batch_size, device))
        for step in range(start, plan.steps):
            image, label, brain, brain_voxels = (part.to(device, non_blocking=True) for part in next(batches))
            beta.fill_(plan.beta(step))
            learning_rate.fill_(plan.learning_rate(step))
            torch.manual_seed(step_seed(plan.seed, step))
            with noise, LocalReparameterization(guide.posterior) if local and guide is not None else nullcontext():
                loss = svi.step(image, label, brain, brain_voxels)
            done = step + 1
            if steps.stuck:
                raise _stuck(checkpoint, done, parameters, steps, plan)
            figures: dict[str, float] = {}
            terms = {name: float(term) for name, term in elbo.terms.items()}
            if done % _LOG_EVERY == 0 or done == plan.steps:
                figures |= {"loss": loss, **terms, "beta": plan.beta(step), "learning_rate": plan.learning_rate(step)}
                # JSON has no other numbers.
                figures = {name: value for name, value in figures.items() if math.isfinite(value)}
                figures["skipped_steps"] = steps.skipped
            report(done, figures)
            if done == plan.steps or time.monotonic() - saved > _CHECKPOINT_INTERVAL:
                _save(checkpoint, done, parameters, steps)
                saved = time.monotonic()
            # Apart: their sum rises while β does, and looks like a training that goes wrong.
            note = f"log-likelihood {terms['log_likelihood']:.4g}"
            note += f", KL {terms['divergence'] / plan.beta(step):.4g}" if guide is not None else ""
            advance(note + (f", {steps.skipped} steps skipped" if steps.skipped else ""))
        if stopped():  # after the last step: other trainings may follow
            raise Interrupted(stopped(), saved=True)


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for each step, far from those of neighbouring seeds."""
    return (seed * 1_000_003 + step + 1) % 2**63


def steps_reported(checkpoint: Path) -> int:
    """The steps behind a checkpoint whose figures need not be logged again; 0 if there is none.

    Raises:
        RunError: if the file is no checkpoint.
    """
    if not checkpoint.exists():
        return 0
    _, metadata = load_tensors(checkpoint)
    return _steps(checkpoint, metadata) - (metadata.get("unreported") is not None)


def _steps(checkpoint: Path, metadata: Mapping[str, Any]) -> int:
    step = metadata.get("step")
    if not isinstance(step, int) or step < 0:
        raise RunError(f"{checkpoint}: is not a checkpoint; give --overwrite to start again")
    return step


def _stuck(
    checkpoint: Path, done: int, parameters: Mapping[str, nn.Parameter], steps: FiniteSteps, plan: Plan
) -> RunError:
    """The error after too many steps in a row that could not be taken, the last step that could be now saved."""
    taken = done - MOST_IN_A_ROW
    if taken > 0:
        steps.count_on_from({"skipped": steps.skipped - MOST_IN_A_ROW})
        _save(checkpoint, taken, parameters, steps)
    return RunError(
        f"{checkpoint.parent}: the loss or its gradient was not finite in {MOST_IN_A_ROW} steps in a row, to step "
        f"{done}; {f'the checkpoint of step {taken}' if taken > 0 else 'nothing'} is kept. Likely causes: a learning "
        f"rate that is too high (it was {plan.learning_rate(done - 1):.2g}), a scan with absurd intensities, bf16, a "
        "prior that is too narrow. Begin again with --overwrite and a lower --learning-rate, or without that scan, "
        "with --precision float32, with a larger --prior-scale"
    )


def patch_loader(patches: Dataset[Batch], batch_size: int, device: torch.device) -> DataLoader[Batch]:
    """Batches in order, on the CPU: made where they are asked for, or ahead by other processes beside a GPU."""
    return DataLoader(
        patches,
        batch_size,
        num_workers=_workers(device),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _workers(device: torch.device) -> int:
    # On a CPU the transforms take a hundredth of a step; beside a GPU they are hidden behind it.
    return 0 if device.type == "cpu" else 2


def _leave_signals_to_the_parent(worker: int) -> None:
    # A terminal or a scheduler signals the whole process group; a worker that died would take the checkpoint along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _save(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    steps: FiniteSteps,
    unreported: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint: values, state of the optimiser, steps done, and the figures of the last step if it has not
    been reported. All that is random, and all rates, are functions of the step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter
        state = steps.optimizer.state.get(parameter, {})
        tensors |= {f"{key}/{name}": value for key, value in state.items()}
    save_tensors(path, tensors, {"step": step, "unreported": unreported, **steps.counts()})


def _restore(
    path: Path, parameters: Mapping[str, nn.Parameter], steps: FiniteSteps
) -> tuple[int, Mapping[str, float] | None]:
    """Load a checkpoint, if there is one; return the steps done, and the figures that are still to be reported."""
    if not path.exists():
        return 0, None
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
            steps.optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in of.items()}
    unreported = metadata.get("unreported")
    counts = [metadata.get(name, 0) for name in steps.counts()]
    if not all(isinstance(count, int) for count in counts) or not isinstance(unreported, dict | None):
        raise RunError(f"{path}: is not a checkpoint; give --overwrite to start again")
    steps.count_on_from(metadata)
    return _steps(path, metadata), unreported
