"""Training on the target cases, shared by `svi` and `finetune`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.training import DEFAULT_EVIDENCE, FinetuneConfig, SviConfig
from dwp_pyro.inference.loop import TrainingSchedule
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.priors.blocks import write_blocks
from dwp_pyro.runtime.device import torch_device
from dwp_pyro.runtime.files import file_digest
from dwp_pyro.runtime.run_folder import RunFolder
from dwp_pyro.training.choose_decision import choose_decision
from dwp_pyro.training.metrics_log import Track, read_metrics
from dwp_pyro.training.network_training import (
    TrainingSetup,
    have_learned,
    network_config_for,
    train_network,
    trained_member,
    training_patches,
    validation_dice,
)
from dwp_pyro.training.posterior_summary import (
    PATCHES,
    block_summaries,
    evaluate_elbo,
    report_nulls,
    report_unconverged,
    summarize,
)
from dwp_pyro.training.pseudo_labels import with_pseudo_labels
from dwp_pyro.training.tracking import check_tracker, tracked
from dwp_pyro.training.training_data import TrainingData, load_training_data, load_unlabelled, resolve

__all__ = ["train_target", "training_schedule"]

_logger = logging.getLogger(__name__)

#: Function of network config, device and member.
MakeSetup = Callable[[NetworkConfig, torch.device, int], TrainingSetup]
#: Function of network config, device, member and its trained setup.
MakeNulls = Callable[[NetworkConfig, torch.device, int, TrainingSetup], Mapping[str, TrainingSetup]]

_VALIDATIONS = 5  # per run
_NULL_STEPS = 0.25  # fraction of a member's steps: a null model has few weights to train


def train_target(
    command: str,
    config: SviConfig | FinetuneConfig,
    options: RunOptions,
    members: int,
    make_setup: MakeSetup,
    *,
    make_nulls: MakeNulls | None = None,
    beta: Callable[[float], float] = lambda fraction: 1.0,
    evidence: float = DEFAULT_EVIDENCE,
    estimator: str = "weight-sample",
) -> Posterior:
    """Train on the n target cases and save `posterior.safetensors`, the split, the metrics and the settings.

    The members of a mixture are trained one after another, with an equal share of the steps each: the mean of their
    ELBOs is that of the mixture, with the member as a latent variable. Members that have not learned (`have_learned`)
    are excluded from the posterior and its summary. After a warm-up the learning rate follows half a cosine from its
    maximum to a hundredth.

    Masks of predictions follow the decision that `choose_decision` returns. With unlabelled scans, the posterior of a
    first round labels them (`with_pseudo_labels`), and members are trained a second time, from their start, on all.

    A Bayesian run adds a summary to `run.json`: ELBO and its parts, null models of the first member, and the blocks
    (`summarize`).

    Args:
        command: "svi" or "finetune".
        config: Settings.
        options: Output folder, device, and how to treat an existing run.
        members: Number of members of the posterior.
        make_setup: Function that returns the setup of a member.
        make_nulls: Function that returns the setups of a trained member's null models; None for no summary.
        beta: Fraction of a member's steps, above 0 to 1 → weight of the KL term.
        evidence: Independent observations that the segmentation of a case counts as.
        estimator: "weight-sample" or "local".

    Raises:
        UserError: if the scans, the prior or the folder are invalid, before anything is written.
    """
    device = torch_device(options.device)
    check_tracker(options)
    config = resolve(config, config.n)
    folder = (options.out, command, config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    data = load_training_data(config, config.n)
    network_config = network_config_for(config, data)
    unlabelled = () if config.unlabelled is None else load_unlabelled(config, Path(config.unlabelled), data.split)
    seeds = [config.seed * members + member for member in range(members)]

    def make_setups() -> list[TrainingSetup]:
        setups = []
        for member, seed in enumerate(seeds):
            torch.manual_seed(seed)
            setups.append(make_setup(network_config, device, member))
        return setups

    setups = make_setups()
    digests = {str(path): file_digest(path) for path in config.learned_from()}
    if digests:
        _logger.info("learned from: %s", ", ".join(digests))
    with (
        RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run,
        tracked(run.path, config.to_mapping(), options) as track,
    ):
        others = {"unlabelled": [example.id for example in unlabelled]} if unlabelled else {}
        run.pin("split.json", asdict(data.split) | others)
        run.pin("learned_from.json", digests)
        if setups[0].blocks:
            write_blocks(run.path, setups[0].blocks)
        path = run.path / "posterior.safetensors"
        if path.exists():  # the run was stopped while it deleted its checkpoints
            posterior = Posterior.load(path).to(device)
        else:
            schedule = partial(training_schedule, config, beta=beta, estimator=estimator)
            trainer = _Trainer(command, config, data, network_config, device, run.path, track, evidence, schedule)
            trained = _train_members(trainer, setups, seeds)
            if unlabelled:
                both = with_pseudo_labels(data, unlabelled, _posterior(trainer, trained), device)
                # A labeled case is repeated and counts once; an unlabelled one counts as one of its repetitions.
                repeats = (len(both.train) - len(unlabelled)) // len(data.train)
                student = replace(trainer, command=f"{command}-student", data=both, evidence=evidence / repeats)
                trained = _train_members(student, make_setups(), seeds)
                trainer = replace(trainer, command=student.command)
                for each in trained:  # the summary is that of the labeled cases
                    each.model.num_cases, each.model.evidence = len(data.train), evidence
            if make_nulls is not None:
                run.record("summary", _summarize_run(trainer, trained, make_nulls))
            posterior = _posterior(trainer, trained)
            run.record("decision", posterior.decision.to_mapping())
            posterior.save(path)
        for checkpoint in run.path.glob("checkpoint-*.safetensors"):
            checkpoint.unlink()
    return posterior


@dataclass(frozen=True)
class _Trainer:
    """Trains setups on the target cases of one run; fields as the arguments of `train_network`."""

    command: str
    config: SviConfig | FinetuneConfig
    data: TrainingData
    network_config: NetworkConfig
    device: torch.device
    run: Path
    track: Track
    evidence: float
    schedule: Callable[[int, int], TrainingSchedule]

    def train(self, setup: TrainingSetup, stage: str, seed: int, steps: int) -> SegmentationModel:
        return train_network(
            setup,
            network_config=self.network_config,
            data=self.data,
            settings=self.config,
            schedule=self.schedule(seed, steps),
            run=self.run,
            checkpoint=self.run / f"checkpoint-{stage}.safetensors",
            device=self.device,
            stage=stage,
            track=self.track,
            evidence=self.evidence,
        )


class _TrainedMember(NamedTuple):
    """A trained member of the posterior, and the number, seed, stage and steps of its training."""

    number: int
    seed: int
    stage: str
    steps: int
    setup: TrainingSetup
    model: SegmentationModel
    member: Member
    dice: float | None


def _train_members(trainer: _Trainer, setups: Sequence[TrainingSetup], seeds: Sequence[int]) -> list[_TrainedMember]:
    """Train all members; return those that have learned."""
    steps = trainer.config.steps // len(setups)
    trained = []
    for number, (setup, seed) in enumerate(zip(setups, seeds, strict=True)):
        stage = trainer.command if len(setups) == 1 else f"{trainer.command}-member{number}"
        model = trainer.train(setup, stage, seed, steps)
        member = trained_member(setup, trainer.network_config, trainer.device)
        dice = validation_dice(Posterior(trainer.network_config, [member]), trainer.data, trainer.device)
        trained.append(_TrainedMember(number, seed, stage, steps, setup, model, member, dice))
    learned = have_learned("member", [each.dice for each in trained])
    return [each for each, kept in zip(trained, learned, strict=True) if kept]


def _posterior(trainer: _Trainer, trained: Sequence[_TrainedMember]) -> Posterior:
    """Return the posterior of the trained members, with its decision."""
    posterior = Posterior(trainer.network_config, [each.member for each in trained])
    posterior.decision = choose_decision(posterior, trainer.data, trainer.config.mirror, trainer.device)
    return posterior


def _summarize_run(trainer: _Trainer, trained: Sequence[_TrainedMember], make_nulls: MakeNulls) -> dict[str, Any]:
    """Train the null models of the first member, and return the summary; log its warnings."""
    config, device, first = trainer.config, trainer.device, trained[0]
    torch.manual_seed(first.seed)
    null_models = {
        null: trainer.train(setup, f"{trainer.command}-{null}", first.seed, math.ceil(first.steps * _NULL_STEPS))
        for null, setup in make_nulls(trainer.network_config, device, first.number, first.setup).items()
    }
    patches = training_patches(trainer.data, config, config.seed, PATCHES)
    parts = [evaluate_elbo(each.model, each.setup.guide, patches, config.seed) for each in trained]
    nulls = {null: evaluate_elbo(model, None, patches, config.seed)["elbo"] for null, model in null_models.items()}
    blocks = block_summaries([each.setup for each in trained])
    summary = summarize(parts, nulls, [each.dice for each in trained], blocks)
    report_nulls(summary)
    records = read_metrics(trainer.run / "metrics.jsonl")
    for each in trained:
        report_unconverged(records, each.stage, each.steps)
    return summary


def training_schedule(
    config: SviConfig | FinetuneConfig, seed: int, steps: int, beta: Callable[[float], float], estimator: str
) -> TrainingSchedule:
    """Return the schedule of a training of `steps` steps; other arguments as for `train_target`."""
    return TrainingSchedule(
        steps=steps,
        learning_rate=lambda step: config.learning_rate * (0.505 + 0.495 * math.cos(math.pi * step / steps)),
        seed=seed,
        beta=lambda step: beta((step + 1) / steps),
        weight_decay=config.weight_decay,
        estimator=estimator,
        validate_every=max(1, steps // _VALIDATIONS),
    )
