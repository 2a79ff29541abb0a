"""What `svi` and `finetune` share: a run on the target's training cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from dwp_pyro.config import DEFAULT_EVIDENCE, FinetuneConfig, RunOptions, SviConfig
from dwp_pyro.errors import RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.inference.svi import TrainingSchedule
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.pipeline.blocks import write_blocks
from dwp_pyro.pipeline.metrics_log import read_metrics
from dwp_pyro.pipeline.summary import (
    PATCHES,
    block_summaries,
    evaluate_elbo,
    report_nulls,
    report_unconverged,
    summarize,
)
from dwp_pyro.pipeline.tracking import check_tracker, tracked
from dwp_pyro.pipeline.train_network import (
    Program,
    network_card,
    report_learned,
    train_network,
    trained_member,
    training_patches,
    validation_dice,
)
from dwp_pyro.pipeline.training_data import TrainingData, load_training_data, with_defaults
from dwp_pyro.storage import RunFolder, file_digest

__all__ = ["fit_target", "load_source_network", "source_networks", "training_schedule"]

_VALIDATIONS = 5  # in a run
_NULL_STEPS = 0.25  # of a member's: few weights are trained


def fit_target(
    command: str,
    config: SviConfig | FinetuneConfig,
    options: RunOptions,
    members: int,
    prepare: Callable[[NetworkCard, torch.device, int], Program],
    *,
    nulls: Callable[[NetworkCard, torch.device, int, Program], Mapping[str, Program]] | None = None,
    beta: Callable[[float], float] = lambda fraction: 1.0,
    evidence: float = DEFAULT_EVIDENCE,
    estimator: str = "shared",
) -> Posterior:
    """Train on the n target cases and save `posterior.safetensors`, the split, the metrics and the settings.

    The members of a mixture are trained one after the other, with an equal share of the steps each: the mean of their
    ELBOs is that of the mixture, with the member as a latent variable. Members that have not learned are left out
    (`have_learned`), and of the summary. After a warm-up the learning rate follows half a cosine from its highest to a
    hundredth.

    A Bayesian run ends with a summary in `run.json`: ELBO and its parts, the nulls of the first member, and the blocks
    (`summarize`).

    Args:
        command: "svi" or "finetune".
        config: Settings.
        options: Where and how to run.
        members: Members of the posterior.
        prepare: Function of card, device and member's number that builds a program at its start.
        nulls: Function of card, device, member's number and trained program that builds its null programs.
        beta: Fraction of a member's steps, above 0 to 1 → weight of the KL term.
        evidence: Observations that a case counts as.
        estimator: "shared" or "local".

    Raises:
        UserError: if the scans, the prior or the folder are unfit; nothing is then written.
    """
    device = torch_device(options.device)
    check_tracker(options)
    config = with_defaults(config, config.n)
    folder = (options.out, command, config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    data = load_training_data(config, config.n)
    card = network_card(config, data)
    steps = config.steps // members
    seeds = [config.seed * members + member for member in range(members)]
    programs = []
    for member, seed in enumerate(seeds):
        torch.manual_seed(seed)
        programs.append(prepare(card, device, member))
    digests = {str(path): file_digest(path) for path in config.learned_from()}
    with (
        RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run,
        tracked(run.path, config.to_mapping(), options) as track,
    ):
        run.pin("split.json", data.split.to_mapping())
        run.pin("learned_from.json", digests)
        if programs[0].blocks:
            write_blocks(run.path, programs[0].blocks)

        def train(program: Program, stage: str, seed: int, steps: int) -> SegmentationModel:
            return train_network(
                program,
                card=card,
                data=data,
                settings=config,
                schedule=training_schedule(config, seed, steps, beta, estimator),
                run=run.path,
                checkpoint=run.path / f"checkpoint-{stage}.safetensors",
                device=device,
                stage=stage,
                track=track,
                evidence=evidence,
            )

        path = run.path / "posterior.safetensors"
        if path.exists():  # stopped while the checkpoints were deleted
            posterior = Posterior.load(path).to(device)
        else:
            stages = [command if members == 1 else f"{command}-member{member}" for member in range(members)]
            models = [train(*each, steps) for each in zip(programs, stages, seeds, strict=True)]
            trained = [trained_member(program, card, device) for program in programs]
            dice = [_dice(card, one, data, device) for one in trained]
            learned = report_learned("member", dice) if members > 1 else [True]
            kept = [member for member in range(members) if learned[member]]
            if nulls is not None:
                first = kept[0]
                torch.manual_seed(seeds[first])
                null_models = {
                    null: train(program, f"{command}-{null}", seeds[first], math.ceil(steps * _NULL_STEPS))
                    for null, program in nulls(card, device, first, programs[first]).items()
                }
                patches = training_patches(data, config, config.seed, PATCHES)
                parts = [evaluate_elbo(models[one], programs[one].guide, patches, config.seed) for one in kept]
                elbos = {
                    null: evaluate_elbo(model, None, patches, config.seed)["elbo"]
                    for null, model in null_models.items()
                }
                blocks = block_summaries([programs[one] for one in kept])
                summary = summarize(parts, elbos, [dice[one] for one in kept], blocks)
                run.record("summary", summary)
                report_nulls(summary)
                records = read_metrics(run.path / "metrics.jsonl")
                for one in kept:
                    report_unconverged(records, stages[one], steps)
            posterior = Posterior(card, [trained[one] for one in kept])
            posterior.save(path)
        for checkpoint in run.path.glob("checkpoint-*.safetensors"):
            checkpoint.unlink()
    return posterior


def training_schedule(
    config: SviConfig | FinetuneConfig, seed: int, steps: int, beta: Callable[[float], float], estimator: str
) -> TrainingSchedule:
    """The schedule of a member of so many steps; arguments as for `fit_target`."""
    return TrainingSchedule(
        steps=steps,
        learning_rate=lambda step: config.learning_rate * (0.505 + 0.495 * math.cos(math.pi * step / steps)),
        seed=seed,
        beta=lambda step: beta((step + 1) / steps),
        weight_decay=config.weight_decay,
        estimator=estimator,
        validate_every=max(1, steps // _VALIDATIONS),
    )


def _dice(card: NetworkCard, member: Member, data: TrainingData, device: torch.device) -> float | None:
    return validation_dice(Posterior(card, [member]), data, device) if data.validation else None


def source_networks(folder: Path) -> int:
    """How many source networks fit-prior left; see `load_source_network` for what is raised."""
    return len(_load_sources(folder).members)


def _load_sources(folder: Path) -> Posterior:
    path = folder / "source.safetensors"
    if not path.exists():
        raise RunError(
            f"{path}: no source network; make one with 'dwp-pyro fit-prior', name its folder by --prior-from, "
            "or do without (svi --centre none, finetune --init random)"
        )
    return Posterior.load(path)


def load_source_network(folder: Path, card: NetworkCard, member: int) -> nn.Module:
    """A source network that fit-prior left, if it has the target's form; member 0 is the best.

    Where it segments one region and the target several, each of them starts from that one.

    Raises:
        RunError: if there is none, there are too few, or its channels, widths or blocks differ.
    """
    path = folder / "source.safetensors"
    source = _load_sources(folder)
    for name in ("network", "modalities", "widths"):
        found, wanted = getattr(source.card, name), getattr(card, name)
        if found != wanted:
            raise RunError(
                f"{path}: the source network has {name} {found}, the target {wanted}; they must agree, or "
                "do without it (svi --centre none, finetune --init random)"
            )
    if member >= len(source.members):
        raise RunError(
            f"{path}: holds {len(source.members)} source networks, one a bootstrap, and each member needs its own; "
            f"give --members {len(source.members)}, or run fit-prior with more --bootstraps"
        )
    network, _ = source.members[member]
    if len(source.card.regions) != len(card.regions):
        if len(source.card.regions) > 1:
            raise RunError(
                f"{path}: the source network segments {len(source.card.regions)} regions, the target "
                f"{len(card.regions)}; give as many by --region, or do without it"
            )
        rows = torch.tensor([0, *[1] * len(card.regions)])  # the background's, and the region's for each
        wanted = card.build()
        shapes = {name: tensor.shape for name, tensor in wanted.state_dict().items()}
        wanted.load_state_dict(
            {name: w if w.shape == shapes[name] else w[rows] for name, w in network.state_dict().items()}
        )
        network = wanted
    return network.requires_grad_(True)
