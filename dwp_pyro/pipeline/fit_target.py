"""What `svi` and `finetune` share: a run on the target's training cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dwp_pyro.config import FinetuneConfig, RunOptions, SviConfig
from dwp_pyro.errors import RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.inference.svi import Plan
from dwp_pyro.pipeline.blocks import write_blocks
from dwp_pyro.pipeline.tracking import check_tracker, tracked
from dwp_pyro.pipeline.train_network import Program, network_card, report_learned, train_network, validation_dice
from dwp_pyro.pipeline.training_data import TrainingData, load_training_data, with_defaults
from dwp_pyro.storage import RunFolder, file_digest

__all__ = ["fit_target", "load_source_network", "source_networks"]

_VALIDATIONS = 5  # in a run


def fit_target(
    command: str,
    config: SviConfig | FinetuneConfig,
    options: RunOptions,
    members: int,
    prepare: Callable[[NetworkCard, torch.device, int], Program],
    *,
    beta: Callable[[float], float] = lambda part: 1.0,
    estimator: str = "shared",
    kernel_part: float = 1.0,
) -> Posterior:
    """Train on the n target cases and save `posterior.safetensors`, the split, the metrics and the settings.

    The members of a mixture are trained one after the other, with an equal part of the steps each: the mean of their
    ELBOs is that of the mixture, with the member as a latent variable. Members that have not learned are left out
    (`have_learned`). The learning rate follows half a cosine from
    its highest to a hundredth.

    Args:
        command: "svi" or "finetune".
        config: settings.
        options: where and how.
        members: of the posterior.
        prepare: card, device and number of the member → the program at its start, on that device.
        beta: part of a member's steps, above 0 to 1 → weight of the KL term.
        estimator: "shared" or "local".
        kernel_part: part of the kernels at which a prior without closed form is taken in a step.

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
        path = run.path / "posterior.safetensors"
        checkpoints = [run.path / f"checkpoint{member}.safetensors" for member in range(members)]
        if path.exists():  # stopped while the checkpoints were deleted
            posterior = Posterior.load(path).to(device)
        else:
            trained: list[Member] = []
            for member, (program, seed, checkpoint) in enumerate(zip(programs, seeds, checkpoints, strict=True)):
                plan = Plan(
                    steps=steps,
                    learning_rate=lambda step: (
                        config.learning_rate * (0.505 + 0.495 * math.cos(math.pi * step / steps))
                    ),
                    seed=seed,
                    beta=lambda step: beta((step + 1) / steps),
                    weight_decay=config.weight_decay,
                    estimator=estimator,
                    kernel_part=kernel_part,
                    validate_every=max(1, steps // _VALIDATIONS),
                )
                one = train_network(
                    program,
                    card=card,
                    data=data,
                    settings=config,
                    plan=plan,
                    run=run.path,
                    checkpoint=checkpoint,
                    device=device,
                    stage=command if members == 1 else f"{command}-member{member}",
                    track=track,
                )
                trained += one.members
            posterior = Posterior(card, _learned(trained, card, data, device))
            posterior.save(path)
        for checkpoint in checkpoints:
            checkpoint.unlink(missing_ok=True)
    return posterior


def _learned(members: list[Member], card: NetworkCard, data: TrainingData, device: torch.device) -> list[Member]:
    """The members that have learned; see `have_learned`."""
    if len(members) == 1 or not data.validation:
        return members
    learned = report_learned("member", [validation_dice(Posterior(card, [one]), data, device) for one in members])
    return [member for member, kept in zip(members, learned, strict=True) if kept]


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
