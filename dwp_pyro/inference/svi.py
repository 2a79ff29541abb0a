"""The SVI loop: annealing, progress, checkpoint, resume. Every method is trained by it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from dwp_pyro.inference.checkpoint import load_checkpoint, save_checkpoint
from dwp_pyro.inference.cuda_graph import Recorded
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.finite_steps import MOST_IN_A_ROW, FiniteSteps
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.progress import progress
from dwp_pyro.signals import raise_signals, stop_signals

__all__ = ["OneOptimizer", "RecordedLoss", "TrainingSchedule", "fit", "patch_loader", "pyro_svi", "step_seed"]

_CHECKPOINT_INTERVAL = 60.0  # seconds
_LOG_EVERY = 10  # steps
_WARM_UP = 50  # steps
#: Learning rates of a guide's means, in the units of the prior, and of log-scales, as multiples of that of network
#: weights, which are of the order of a tenth. Adam moves a parameter by about its rate per step whatever the gradient:
#: at one rate for all no standard deviation would leave its start within a run.
_SHIFT_RATE, _SCALE_RATE = 12.5, 50.0
#: A standard deviation has the Fisher information 2 in its logarithm, whatever it is: gradients by it have a unit. Far
#: below 1 they are noise, which Adam would otherwise blow up to steps of the full rate.
_SCALE_EPS = 1.0
#: Squared gradients are averaged over 20 steps instead of 1,000: those of the first steps, whatever the width at which
#: the guide starts, are orders of magnitude larger and would slow down all that follow.
_GUIDE_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TrainingSchedule:
    """How to optimize. Rates are functions of the step alone, so that a resumed run equals an uninterrupted one.

    Args:
        steps: Optimization steps.
        learning_rate: Step → learning rate of AdamW; a guide's means have 12.5 times as much, the
            logarithms of scales 50 times.
        seed: Seed of the weight samples; what step t draws follows from (seed, t).
        beta: Step → weight of the KL term, above 0.
        weight_decay: Weight decay of AdamW, on the network's deterministic parameters.
        estimator: "shared" or "local".
        validate_every: Steps between two calls of `validate`.
    """

    steps: int
    learning_rate: Callable[[int], float]
    seed: int
    beta: Callable[[int], float] = lambda step: 1.0
    weight_decay: float = 0.0
    estimator: str = "shared"
    validate_every: int = 100

    def warmed_up(self, step: int) -> float:
        """The learning rate of a step: in the first tenth of the steps, or 50 of them, it rises from 0.

        At full rate from the start one network in ten learned nothing: its output saturates at the background.
        """
        return self.learning_rate(step) * min(1.0, (step + 1) / min(_WARM_UP, self.steps / 10))


class OneOptimizer(PyroOptim):
    """Step one torch optimizer over all parameters in `SVI`, instead of one per tensor: its state can be saved.

    The set of parameters that SVI passes has no order and is ignored.

    Args:
        take_step: Optimizer that skips steps whose loss or gradient is not finite.
        elbo: ELBO that SVI maximizes; the loss is read from its last terms.
    """

    def __init__(self, take_step: FiniteSteps, elbo: MeanFieldELBO) -> None:
        self.take_step = take_step
        self.elbo = elbo

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.take_step(torch.as_tensor(sum(self.elbo.terms.values())))


class RecordedLoss:
    """−ELBO and its gradients, recorded: for SVI in the place of `elbo.loss_and_grads`.

    Args:
        elbo: ELBO; a `beta` that changes is a tensor on the GPU.
        parameters: Parameters on a GPU; their gradients are set to None after each step, as `FiniteSteps` does.

    Raises:
        ValueError: if a batch has other shapes than the first.
    """

    def __init__(self, elbo: MeanFieldELBO, parameters: Sequence[nn.Parameter]) -> None:
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
    elbo: MeanFieldELBO, parameters: Sequence[nn.Parameter], model: Any, guide: Any, batch: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    loss = elbo.differentiable_loss(model, guide, *batch)
    loss.backward()
    return loss.detach(), elbo.terms, [parameter.grad for parameter in parameters]


def pyro_svi(model: SegmentationModel, guide: MeanFieldNormal | None, steps: FiniteSteps, elbo: MeanFieldELBO) -> SVI:
    """Pyro's SVI over all parameters of one optimizer; on a GPU the loss, its gradients and the step are recorded."""
    # Not the guide's own call, which registers each of its parameters with Pyro at each step: the optimizer has them.
    draw = (lambda *batch: {}) if guide is None else guide.forward
    program: tuple[Any, Any, OneOptimizer] = (model, draw, OneOptimizer(steps, elbo))
    if steps.parameters[0].device.type != "cuda":
        return SVI(*program, elbo)
    steps.record()
    return SVI(*program, elbo.loss, RecordedLoss(elbo, steps.parameters))


def fit(
    model: SegmentationModel,
    guide: MeanFieldNormal | None,
    patches: Patches,
    batch_size: int,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    description: str,
    log: Callable[[int, Mapping[str, float]], None],
    validate: Callable[[], Mapping[str, float]] = dict,
    at_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Maximize the ELBO of a model under a guide; of a model without sites (guide None), the likelihood.

    The parameters are trained in place. A step whose loss or gradient is not finite is skipped and counted
    (`skipped_steps` among the metrics). If `checkpoint` exists the loop resumes from there, to the same result, bit by
    bit on the same CPU with as many threads.

    Args:
        model: Generative program, on its device.
        guide: Guide, on the same device.
        patches: `schedule.steps` × `batch_size` patches.
        batch_size: Patches per step.
        schedule: Rates, estimator, seeds.
        checkpoint: File that is written every minute, on SIGINT and SIGTERM, and at the end.
        description: Label of the progress bar.
        log: Function of the step and its metrics, called every ten steps and after each validation.
        validate: Function that returns metrics to log every `validate_every` steps and at the last.
        at_step: Function called after step t = 1, 2, … (before the checkpoint of that step is written).

    Raises:
        Interrupted: after a signal, with the checkpoint saved.
        RunError: if the checkpoint does not fit, or `MOST_IN_A_ROW` steps in a row had to be skipped; the checkpoint
            is then that of the last step that was taken. If a parameter is NaN or infinite by itself, with the
            checkpoint before it.
    """
    keep_freed_memory()
    parameters = _trainable(model, guide)
    device = next(iter(parameters.values())).device
    # On the device: the graph of a step reads them there.
    beta, *rates = (torch.ones((), device=device) for _ in range(4))
    steps = FiniteSteps(_optimizer(parameters, schedule.weight_decay, rates))
    elbo = MeanFieldELBO(beta)
    local = schedule.estimator == "local" and guide is not None
    start, unreported = load_checkpoint(checkpoint, parameters, steps)
    rest = Subset(patches, range(start * batch_size, schedule.steps * batch_size))
    saved = time.monotonic()
    model.train()
    with (
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        stop_signals() as stopped,
        progress(description, schedule.steps, start) as advance,
    ):

        def report(step: int, metrics: Mapping[str, float]) -> None:
            # May take as long as many steps, so a signal ends it at once; the resumed run does it again. But not while
            # metrics are logged: TensorBoard's queue would keep its lock, and never be closed.
            try:
                with _interruptible(stopped):
                    validated = step % schedule.validate_every == 0 or step == schedule.steps
                    logged = {**metrics, **(validate() if validated else {})}
                model.train()
                if logged:
                    log(step, logged)
                with _interruptible(stopped):
                    at_step(step)
            except Interrupted as stop:
                save_checkpoint(checkpoint, step, parameters, steps, metrics)
                raise Interrupted(stop.signum, saved=True) from None

        if unreported is not None:
            report(start, unreported)
        svi = pyro_svi(model, guide, steps, elbo)
        handler = LocalReparameterization(guide.posterior) if local and guide is not None else nullcontext()
        for step, batch in enumerate(patch_loader(rest, batch_size, device), start):
            for rate, factor in zip(rates, (1.0, _SHIFT_RATE, _SCALE_RATE), strict=True):
                rate.fill_(factor * schedule.warmed_up(step))
            beta.fill_(schedule.beta(step))
            torch.manual_seed(step_seed(schedule.seed, step))
            with handler:
                loss = svi.step(*(part.to(device, non_blocking=True) for part in batch))
            done = step + 1
            if steps.stuck:
                raise _stuck(checkpoint, done, parameters, steps, schedule)
            terms = {name: float(term) for name, term in elbo.terms.items()}
            metrics: dict[str, float] = {}
            if done % _LOG_EVERY == 0 or done == schedule.steps:
                metrics = {
                    "loss": loss,
                    **terms,
                    "beta": schedule.beta(step),
                    "learning_rate": schedule.warmed_up(step),
                }
                # JSON cannot represent NaN or infinity.
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
                metrics["skipped_steps"] = steps.skipped
            report(done, metrics)
            if done == schedule.steps or time.monotonic() - saved > _CHECKPOINT_INTERVAL:
                save_checkpoint(checkpoint, done, parameters, steps)
                saved = time.monotonic()
            note = f"log-likelihood {terms['log_likelihood']:.4g}"
            note += f", KL {terms['kl']:.4g}" if guide is not None else ""
            advance(note + (f", {steps.skipped} steps skipped" if steps.skipped else ""))
        if stopped():  # after the last step: other trainings may follow
            raise Interrupted(stopped(), saved=True)


@contextmanager
def _interruptible(stopped: Callable[[], int]) -> Iterator[None]:
    """Raise `Interrupted` for a signal that came before or comes meanwhile."""
    with raise_signals():
        if stopped():
            raise Interrupted(stopped())
        yield


def _trainable(model: nn.Module, guide: MeanFieldNormal | None) -> dict[str, nn.Parameter]:
    """Name → parameter, of all that a run trains."""
    parameters = dict(model.named_parameters())
    if guide is not None:
        parameters |= {f"guide.{name}": parameter for name, parameter in guide.named_parameters()}
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def _optimizer(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, rates: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """AdamW, with groups for deterministic weights, which decay, for posterior means, for log-scales, and the rest."""
    settings: dict[str, dict[str, Any]] = {
        "network.": {"lr": rates[0], "weight_decay": weight_decay},
        "guide.shifts.": {"lr": rates[1], "betas": _GUIDE_BETAS},
        "guide.log_scales.": {"lr": rates[2], "betas": _GUIDE_BETAS, "eps": _SCALE_EPS},
        "prior_modules.scales.": {"lr": rates[2], "betas": _GUIDE_BETAS, "eps": _SCALE_EPS},
        "": {"lr": rates[0]},
    }
    left = dict(parameters)
    groups = []
    for prefix, setting in settings.items():
        ours = [left.pop(name) for name in list(left) if name.startswith(prefix)]
        groups.append({"params": ours, "weight_decay": 0.0, **setting})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rates[0], fused=True)


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for each step, far from those of neighbouring seeds."""
    return (seed * 1_000_003 + step + 1) % 2**63


def _stuck(
    checkpoint: Path, done: int, parameters: Mapping[str, nn.Parameter], steps: FiniteSteps, schedule: TrainingSchedule
) -> RunError:
    """The error after too many steps in a row that could not be taken, the last step that could be now saved."""
    taken = done - MOST_IN_A_ROW
    if taken > 0:
        steps.count_on_from({"skipped": steps.skipped - MOST_IN_A_ROW})
        save_checkpoint(checkpoint, taken, parameters, steps)
    return RunError(
        f"{checkpoint.parent}: the loss or its gradient was not finite in {MOST_IN_A_ROW} steps in a row, to step "
        f"{done}; {f'the checkpoint of step {taken}' if taken > 0 else 'nothing'} is kept. Likely causes: a learning "
        f"rate that is too high (it was {schedule.warmed_up(done - 1):.2g}), a scan with absurd intensities, bf16, "
        "a prior that is too narrow. Begin again with --overwrite and a lower --learning-rate, or without that scan, "
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
