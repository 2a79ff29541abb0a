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
from dwp_pyro.config.training import DEFAULT_EVIDENCE, TargetConfig
from dwp_pyro.data.preprocessing import Example
from dwp_pyro.data.split import Split, read_roles
from dwp_pyro.inference.checkpoint import steps_reported
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.inference.schedule import TrainingSchedule, step_seed
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.priors.blocks import write_blocks
from dwp_pyro.runtime.device import catch_out_of_memory, torch_device
from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.files import file_digest, files_digest, locked, read_yaml
from dwp_pyro.runtime.progress import progress
from dwp_pyro.runtime.run_folder import RunFolder, check_pinned
from dwp_pyro.training.choose_decision import choose_decision
from dwp_pyro.training.metrics_log import Track, no_track, read_metrics
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
from dwp_pyro.training.training_data import TrainingData, find_unlabelled, load_training_data, load_unlabelled, resolve

__all__ = ["Method", "train_target"]

_logger = logging.getLogger(__name__)

#: Function of network config, device and member.
MakeSetup = Callable[[NetworkConfig, torch.device, int], TrainingSetup]
#: Function of network config, device, member and its trained setup.
MakeNulls = Callable[[NetworkConfig, torch.device, int, TrainingSetup], Mapping[str, TrainingSetup]]

_VALIDATIONS = 5  # per run
_NULL_STEPS = 0.25  # fraction of a member's steps: a null model has few weights to train
_TEACHER = "checkpoint-teacher.safetensors"


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained on the target cases, and how. Functions are at module level, for workers.

    Args:
        command: "svi" or "finetune".
        config: Settings.
        members: Number of members of the posterior.
        make_setup: Function that returns the setup of a member.
        make_nulls: Function that returns the setups of a trained member's null models; None for no summary.
        beta: Fraction of a member's steps, above 0 to 1 → weight of the KL term; None for 1.
        evidence: Independent observations that the segmentation of a case counts as.
        estimator: "weight-sample" or "local".
    """

    command: str
    config: TargetConfig
    members: int
    make_setup: MakeSetup
    make_nulls: MakeNulls | None = None
    beta: Callable[[float], float] | None = None
    evidence: float = DEFAULT_EVIDENCE
    estimator: str = "weight-sample"

    def seed(self, member: int) -> int:
        """Return the seed of a member, distinct from those of runs with neighboring seeds."""
        return self.config.seed * self.members + member

    @property
    def evaluation_seed(self) -> int:
        """Seed of patches and noise that no training has seen, the same for all numbers of members."""
        return step_seed(self.config.seed + 1, 0)

    def setup(self, network_config: NetworkConfig, device: torch.device, member: int) -> TrainingSetup:
        """Return the setup of a member, at its start."""
        torch.manual_seed(self.seed(member))
        return self.make_setup(network_config, device, member)

    def schedule(self, seed: int, steps: int) -> TrainingSchedule:
        """Return the schedule of a training: after a warm-up, the rate falls along half a cosine to a hundredth."""
        rate = self.config.learning_rate
        return TrainingSchedule(
            steps=steps,
            learning_rate=lambda step: rate * (0.505 + 0.495 * math.cos(math.pi * step / steps)),
            seed=seed,
            beta=lambda step: 1.0 if self.beta is None else self.beta((step + 1) / steps),
            weight_decay=self.config.weight_decay,
            estimator=self.estimator,
            validate_every=max(1, steps // _VALIDATIONS),
        )


def _warn_of_seen_test_cases(config: TargetConfig, split: Split) -> None:
    """Warn if fit-prior learned from test cases: with the same root, and another split.

    Several roots, copies of scans, and priors without the folder of their fit are not recognized.
    """
    folder = config.prior_folder
    if not any(path.parent == folder and path.suffix == ".safetensors" for path in config.learned_from()):
        return
    try:
        if Path(read_yaml(folder / "config.yaml")["root"]).resolve() != Path(str(config.root)).resolve():
            return
        roles = read_roles(folder / "split.json", RunError)
    except (RunError, LookupError, TypeError, ValueError, OSError, RuntimeError):  # not made from scans, or damaged
        return
    seen = sorted({*roles.get("train", ()), *roles.get("validation", ())} & set(split.test))
    if seen:
        _logger.warning(
            "%s learned from %d of the %d test cases, for example '%s', so their metrics will be too good; give "
            "fit-prior and this command the same split",
            folder,
            len(seen),
            len(split.test),
            seen[0],
        )


def train_target(method: Method, options: RunOptions) -> Posterior:
    """Train on the n target cases and save `posterior.safetensors`, the split, the metrics and the settings.

    The members of a mixture have an equal share of the steps each: the mean of their ELBOs is that of the mixture, with
    the member as a latent variable. They are trained one after another, or by `options.workers`. Members that have not
    learned (`have_learned`) are excluded from the posterior and its summary.

    Masks of predictions follow the decision that `choose_decision` returns. With unlabelled scans, the posterior of a
    first round labels them (`with_pseudo_labels`), and members are trained a second time, from their start, on all.

    A Bayesian run adds a summary to `run.json`: ELBO and its parts, null models of the first member, and the blocks
    (`summarize`).

    Raises:
        UserError: if the scans, the prior or the folder are invalid, before anything is written.
    """
    device = torch_device(options.device)
    check_tracker(options)
    config = resolve(method.config, method.config.n)
    method = replace(method, config=config)
    folder = (options.out, method.command, config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    data = load_training_data(config, config.n)
    _warn_of_seen_test_cases(config, data.split)
    more = find_unlabelled(config, data.split)
    unlabelled = () if more is None else load_unlabelled(config, more)
    network_config = network_config_for(config, data)
    # The last member needs the most source networks, so that an invalid prior or a missing network fails here.
    blocks = method.setup(network_config, device, method.members - 1).blocks
    digests = {path.name: file_digest(path) for path in config.learned_from()}
    if digests:
        _logger.info("learned from: %s", ", ".join(map(str, config.learned_from())))
    with (
        RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run,
        tracked(run.path, config.to_mapping(), options) as track,
    ):
        others = {"unlabelled": [example.id for example in unlabelled]} if unlabelled else {}
        run.pin("split.json", asdict(data.split) | others)
        run.pin(
            "learned_from.json",
            {"scans": files_digest([*data.files, *(more.scans(config.modality) if more else ())]), **digests},
        )
        if blocks:
            write_blocks(run.path, blocks)
        path = run.path / "posterior.safetensors"
        if path.exists():  # the run was stopped while it deleted its checkpoints
            posterior = Posterior.load(path).to(device)
        else:
            trainer = _Trainer(method, data, device, run.path, track, method.command, method.evidence)
            trained = trainer.train_members(options)
            if unlabelled:
                trainer.posterior(trained).save(run.path / _TEACHER)
                student = trainer.student(unlabelled)
                trained = student.train_members(options)
                # The summary is that of the labeled cases.
                trainer = replace(trainer, name=student.name)
                for each in trained:
                    each.model.num_cases, each.model.evidence = len(data.train), method.evidence
            if method.make_nulls is not None:
                run.record(summary=trainer.summarize(trained, method.make_nulls))
            posterior = trainer.posterior(trained)
            run.record(decision=posterior.decision.to_mapping())
            posterior.save(path)
        for checkpoint in run.path.glob("*checkpoint-*.safetensors"):  # and what a killed write has left of one
            checkpoint.unlink()
    return posterior


class _TrainedMember(NamedTuple):
    """A trained member of the posterior, and the number of its training."""

    number: int
    setup: TrainingSetup
    model: SegmentationModel
    member: Member
    dice: float | None


@dataclass(frozen=True)
class _Trainer:
    """Trains on the target cases of one run.

    `name` begins the names of the stages; `evidence` is that of each case of the data.
    """

    method: Method
    data: TrainingData
    device: torch.device
    run: Path
    track: Track
    name: str
    evidence: float

    @property
    def network_config(self) -> NetworkConfig:
        return network_config_for(self.method.config, self.data)

    @property
    def stages(self) -> list[str]:
        """Names of the trainings of the members."""
        members = self.method.members
        return [self.name] if members == 1 else [f"{self.name}-member{number}" for number in range(members)]

    def student(self, unlabelled: Sequence[Example]) -> _Trainer:
        """Return a trainer on these cases, too, labeled by the saved posterior of the first round."""
        teacher = Posterior.load(self.run / _TEACHER).to(self.device)
        data = with_pseudo_labels(self.data, unlabelled, teacher, self.device)
        # A labeled case is repeated and counts once; an unlabelled one counts as one of its repetitions.
        repeats = (len(data.train) - len(unlabelled)) // len(self.data.train)
        return replace(self, data=data, name=f"{self.name}-student", evidence=self.evidence / repeats)

    def checkpoint(self, stage: str) -> Path:
        return self.run / f"checkpoint-{stage}.safetensors"

    def train(self, setup: TrainingSetup, stage: str, seed: int, steps: int) -> SegmentationModel:
        return train_network(
            setup,
            data=self.data,
            settings=self.method.config,
            schedule=self.method.schedule(seed, steps),
            run=self.run,
            checkpoint=self.checkpoint(stage),
            device=self.device,
            stage=stage,
            track=self.track,
            evidence=self.evidence,
        )

    @property
    def steps(self) -> int:
        """Steps of a member."""
        return self.method.config.steps // self.method.members

    def fit_member(self, number: int) -> tuple[TrainingSetup, SegmentationModel]:
        """Train a member, or load it from the checkpoint of its last step."""
        setup, stage = self.method.setup(self.network_config, self.device, number), self.stages[number]
        with locked(self.run, f".lock-{stage}"):  # a worker of a cluster outlives its command
            return setup, self.train(setup, stage, self.method.seed(number), self.steps)

    def train_member(self, number: int) -> _TrainedMember:
        setup, model = self.fit_member(number)
        member = trained_member(setup, self.network_config, self.device)
        dice = validation_dice(Posterior(self.network_config, [member]), self.data, self.device)
        return _TrainedMember(number, setup, model, member, dice)

    def train_members(self, options: RunOptions) -> list[_TrainedMember]:
        """Train all members, by workers if there are any; return those that have learned."""
        if options.workers is not None:
            work = partial(_train_in_worker, self.method, self.run, options.device, self.name)
            left = [stage for stage in self.stages if steps_reported(self.checkpoint(stage)) < self.steps]
            options.workers.at_most(self.method.members).map(work, left, lambda stage, _: None)
        trained = [self.train_member(number) for number in range(self.method.members)]
        learned = have_learned("member", [each.dice for each in trained])
        return [each for each, kept in zip(trained, learned, strict=True) if kept]

    def posterior(self, trained: Sequence[_TrainedMember]) -> Posterior:
        """Return the posterior of the trained members, with its decision."""
        posterior = Posterior(self.network_config, [each.member for each in trained])
        posterior.decision = choose_decision(posterior, self.data, self.method.config.mirror, self.device)
        return posterior

    def summarize(self, trained: Sequence[_TrainedMember], make_nulls: MakeNulls) -> dict[str, Any]:
        """Train the null models of the first member, and return the summary; log its warnings."""
        config, first = self.method.config, trained[0]
        seed = self.method.seed(first.number)
        torch.manual_seed(seed)
        null_models = {
            null: self.train(setup, f"{self.name}-{null}", seed, math.ceil(self.steps * _NULL_STEPS))
            for null, setup in make_nulls(self.network_config, self.device, first.number, first.setup).items()
        }
        unseen = self.method.evaluation_seed
        patches = training_patches(self.data, config, unseen, PATCHES)
        parts, nulls = [], {}
        with progress("evaluating ELBOs", len(trained) + len(null_models)) as advance:
            for each in trained:
                parts.append(evaluate_elbo(each.model, each.setup.guide, patches, unseen))
                advance("")
            for null, model in null_models.items():
                nulls[null] = evaluate_elbo(model, None, patches, unseen)["elbo"]
                advance("")
        blocks = block_summaries([each.setup for each in trained])
        summary = summarize(parts, nulls, [each.dice for each in trained], blocks)
        report_nulls(summary)
        records = read_metrics(self.run / "metrics.jsonl")
        for each in trained:
            report_unconverged(records, self.stages[each.number], self.steps)
        return summary


def _train_in_worker(method: Method, run: Path, device: str, name: str, stage: str) -> None:
    """Train the member of a stage to its last checkpoint."""
    config = method.config
    with catch_out_of_memory(str(run)):
        data = load_training_data(config, config.n)
        check_pinned(run / "split.json", asdict(data.split))
        trainer = _Trainer(method, data, torch_device(device), run, no_track, method.command, method.evidence)
        if name != trainer.name:  # in the second round
            more = find_unlabelled(config, data.split)
            assert more is not None
            check_pinned(run / "split.json", {"unlabelled": [case.id for case in more.cases]})
            trainer = trainer.student(load_unlabelled(config, more))
        trainer.fit_member(trainer.stages.index(stage))
