"""The SVI loop of all methods: progress, checkpoint, resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import pyro
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from dwp_pyro.data.patches import Batch, PatchDataset
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.checkpoint import load_checkpoint, save_checkpoint
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.inference.optimization import adamw, pyro_svi
from dwp_pyro.inference.schedule import TrainingSchedule, step_seed
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.runtime.distributed import any_signal, lost_processes, process_count, process_number
from dwp_pyro.runtime.errors import Diverged, Interrupted, ProcessLost
from dwp_pyro.runtime.non_finite_guard import MAX_IN_A_ROW, NonFiniteGuard
from dwp_pyro.runtime.progress import progress
from dwp_pyro.runtime.signals import defer_signals, interrupt_on_signal

__all__ = ["fit", "patch_loader"]

_CHECKPOINT_INTERVAL = 60.0  # seconds
_LOG_EVERY = 10  # steps


def fit(
    model: SegmentationModel,
    guide: MeanFieldNormal | None,
    patches: PatchDataset,
    batch_size: int,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    description: str,
    log: Callable[[int, Mapping[str, float]], None],
    validate: Callable[[], Mapping[str, float]] = dict,
    at_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Maximize the ELBO of a model under a guide, or the likelihood of a model without sites (guide None).

    The parameters are trained in place. A step whose loss or gradient is not finite is skipped and counted
    (`skipped_steps` among the metrics). If `checkpoint` exists, the loop resumes from it with the same result, bit by
    bit on the same CPU with the same number of threads.

    With R processes (`torchrun`), each has its own patches and weight samples, and the gradient is the mean over them:
    that of R sub-batches, with the KL once.

    Args:
        model: Generative model, on its device.
        guide: Guide, on the same device.
        patches: `schedule.steps` × `batch_size` patches per process.
        batch_size: Patches per step and process.
        schedule: Rates, estimator and seed.
        checkpoint: File that is written every minute, on SIGINT and SIGTERM, and at the end.
        description: Label of the progress bar.
        log: Function of the step and its metrics, called every ten steps and after each validation.
        validate: Function that returns metrics, called every `validate_every` steps and after the last.
        at_step: Function called after step t = 1, 2, …, before the checkpoint of that step is written.

    Raises:
        Interrupted: after a signal, with the checkpoint saved.
        RunError: if the checkpoint does not fit; if `MAX_IN_A_ROW` steps in a row were skipped, with the checkpoint of
            the last step that was taken; if a parameter is NaN or infinite, with the previous checkpoint.
    """
    parameters = _trainable(model, guide)
    device = next(iter(parameters.values())).device
    # Tensors, because a CUDA graph reads them.
    beta, *rates = (torch.ones((), device=device) for _ in range(4))
    guard = NonFiniteGuard(adamw(parameters, schedule.weight_decay, rates))
    elbo = MeanFieldELBO(beta)
    with lost_processes():
        svi = pyro_svi(model, guide, guard, elbo)
    local = schedule.estimator == "local"
    handler = LocalReparameterization(guide.posterior) if guide is not None and local else nullcontext()
    start, unreported = load_checkpoint(checkpoint, parameters, guard)
    number, count = process_number(), process_count()
    blocks = range(start * count + number, schedule.steps * count, count)
    remaining = Subset(patches, [block * batch_size + index for block in blocks for index in range(batch_size)])
    model.train()
    with (
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        defer_signals() as received,
        progress(description, schedule.steps, start) as advance,
    ):
        save = partial(save_checkpoint, checkpoint, parameters=parameters, guard=guard)
        signum = 0
        record = _Record(model, schedule, save, lambda: signum or received(), log, validate, at_step)
        if unreported is not None:
            record.report(start, unreported)
        for step, batch in enumerate(patch_loader(remaining, batch_size, device), start):
            schedule.set(step, beta, rates)
            torch.manual_seed(step_seed(schedule.seed, step * count + number))
            with record.saved_if_lost(step), handler:
                loss = svi.step(*(part.to(device, non_blocking=True) for part in batch))
            if guard.diverged:
                record.raise_diverged(step + 1, guard, checkpoint.parent)
            terms = {name: float(term) for name, term in elbo.terms.items()}
            with record.saved_if_lost(step + 1, unreported={}):
                signum = any_signal(received())
            record.after_step(step + 1, partial(_metrics, step, loss, terms, schedule, guard))
            advance(_note(terms, guard, bayesian=guide is not None))
        with lost_processes():
            signum = any_signal(received())
        if signum:  # a signal after the last step also stops the trainings that follow
            raise Interrupted(signum, saved=True)


@dataclass
class _Record:
    """What happens after a step: validation, logging and checkpoints. The arguments are those of `fit`."""

    model: nn.Module
    schedule: TrainingSchedule
    save: Callable[..., None]
    stopped: Callable[[], int]
    log: Callable[[int, Mapping[str, float]], None]
    validate: Callable[[], Mapping[str, float]]
    at_step: Callable[[int], None]
    saved: float = field(default_factory=time.monotonic)

    def after_step(self, step: int, metrics: Callable[[], Mapping[str, float]]) -> None:
        """Report a step, and save a checkpoint once a minute and after the last."""
        last = step == self.schedule.steps
        self.report(step, metrics() if last or step % _LOG_EVERY == 0 else {})
        if last or time.monotonic() - self.saved > _CHECKPOINT_INTERVAL:
            self.save(step)
            self.saved = time.monotonic()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Validate, log, and call `at_step`; after a signal, save the checkpoint with the unreported metrics.

        A signal interrupts validation, which may take as long as many steps; the resumed run repeats it. Logging is
        not interrupted: TensorBoard's queue would keep its lock.
        """
        try:
            with _interruptible(self.stopped):
                validated = step % self.schedule.validate_every == 0 or step == self.schedule.steps
                logged = {**metrics, **(self.validate() if validated else {})}
            self.model.train()
            if logged:
                self.log(step, logged)
            with _interruptible(self.stopped):
                self.at_step(step)
        except Interrupted as stop:
            self.save(step, unreported=metrics)
            raise Interrupted(stop.signum, saved=True) from None

    @contextmanager
    def saved_if_lost(self, step: int, unreported: Mapping[str, float] | None = None) -> Iterator[None]:
        """Save the checkpoint of a step if another process of the run ends; `unreported` as in `save_checkpoint`."""
        try:
            with lost_processes():
                yield
        except ProcessLost as problem:
            self.save(step, unreported=unreported)
            raise ProcessLost(f"{problem}; the checkpoint of step {step} is saved") from problem

    def raise_diverged(self, step: int, guard: NonFiniteGuard, run: Path) -> NoReturn:
        """Save the checkpoint of the last step that was taken, and raise `Diverged`."""
        taken = step - MAX_IN_A_ROW
        if taken > 0:
            guard.load_state_dict({"skipped": guard.skipped - MAX_IN_A_ROW})
            self.save(taken)
        kept = f"the checkpoint of step {taken}" if taken > 0 else "nothing"
        raise Diverged(
            f"{run}: the loss or its gradient was not finite in {MAX_IN_A_ROW} steps in a row, to step {step}, "
            f"at the learning rate {self.schedule.warmed_up_rate(step - 1):.2g}; {kept} is kept"
        )


def _metrics(
    step: int, loss: float, terms: Mapping[str, float], schedule: TrainingSchedule, guard: NonFiniteGuard
) -> dict[str, float]:
    metrics = {"loss": loss, **terms, "beta": schedule.beta(step), "learning_rate": schedule.warmed_up_rate(step)}
    # JSON cannot represent NaN or infinity.
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return {**finite, "skipped_steps": guard.skipped}


def _note(terms: Mapping[str, float], guard: NonFiniteGuard, *, bayesian: bool) -> str:
    note = f"log-likelihood {terms['log_likelihood']:.4g}"
    note += f", KL {terms['kl']:.4g}" if bayesian else ""
    return note + (f", {guard.skipped} steps skipped" if guard.skipped else "")


@contextmanager
def _interruptible(stopped: Callable[[], int]) -> Iterator[None]:
    """Raise `Interrupted` for a signal that arrived before or arrives inside."""
    with interrupt_on_signal():
        if stopped():
            raise Interrupted(stopped())
        yield


def _trainable(model: nn.Module, guide: MeanFieldNormal | None) -> dict[str, nn.Parameter]:
    """Return name → trainable parameter, of the model and the guide."""
    parameters = dict(model.named_parameters())
    if guide is not None:
        parameters |= {f"guide.{name}": parameter for name, parameter in guide.named_parameters()}
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def patch_loader(patches: Dataset[Batch], batch_size: int, device: torch.device) -> DataLoader[Batch]:
    """Return batches in order, on the CPU; for a GPU, worker processes prepare them ahead."""
    return DataLoader(
        patches,
        batch_size,
        num_workers=_workers(device),
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
    )


def _workers(device: torch.device) -> int:
    # The transforms take a hundredth of a step on a CPU; on a GPU, workers hide them behind its step.
    return 0 if device.type == "cpu" else 2


def _ignore_signals(worker: int) -> None:
    # Terminals and schedulers signal the whole process group; a dead worker would prevent the checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
