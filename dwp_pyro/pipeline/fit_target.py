"""What `svi` and `finetune` share: a run on the target's training cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from dwp_pyro.config import FinetuneConfig, RunOptions, SviConfig
from dwp_pyro.errors import RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.inference.svi import Plan
from dwp_pyro.models.unet import ResidualUNet3d
from dwp_pyro.pipeline.train_network import Program, network_card, train_network
from dwp_pyro.pipeline.training_data import load_training_data, with_defaults
from dwp_pyro.storage import RunFolder, file_digest

__all__ = ["fit_target", "load_source_network"]

_VALIDATIONS = 5  # in a run


def fit_target(
    command: str,
    config: SviConfig | FinetuneConfig,
    options: RunOptions,
    prepare: Callable[[NetworkCard, torch.device], Program],
    *,
    beta: Callable[[int], float] = lambda step: 1.0,
    estimator: str = "shared",
) -> Posterior:
    """Train on the n target cases and save `posterior.safetensors`, the split, the metrics and the settings.

    The learning rate follows half a cosine from its highest to a hundredth.

    Args:
        command: "svi" or "finetune".
        config: settings.
        options: where and how.
        prepare: card and device → the program at its start, on that device.
        beta: step → weight of the KL term.
        estimator: "shared" or "local".

    Raises:
        UserError: if the scans, the prior or the folder are unfit; nothing is then written.
    """
    device = torch_device(options.device)
    config = with_defaults(config)
    folder = (options.out, command, config.to_mapping())
    RunFolder.check(*folder, resume=options.resume, overwrite=options.overwrite)
    data = load_training_data(config, config.n)
    card = network_card(config, data)
    torch.manual_seed(config.seed)
    program = prepare(card, device)
    digests = {str(path): file_digest(path) for path in config.learned_from()}
    plan = Plan(
        steps=config.steps,
        learning_rate=lambda step: config.learning_rate * (0.505 + 0.495 * math.cos(math.pi * step / config.steps)),
        seed=config.seed,
        beta=beta,
        weight_decay=config.weight_decay,
        estimator=estimator,
        validate_every=max(1, config.steps // _VALIDATIONS),
    )
    with RunFolder.start(*folder, resume=options.resume, overwrite=options.overwrite) as run:
        run.pin("split.json", data.split.to_mapping())
        run.pin("learned_from.json", digests)
        posterior = train_network(
            program,
            card=card,
            data=data,
            settings=config,
            plan=plan,
            run=run.path,
            checkpoint=run.path / "checkpoint.safetensors",
            device=device,
            stage=command,
        )
        posterior.save(run.path / "posterior.safetensors")
    (options.out / "checkpoint.safetensors").unlink()
    return posterior


def load_source_network(folder: Path, card: NetworkCard) -> ResidualUNet3d:
    """The source network that fit-prior left, if it has the target's form.

    Raises:
        RunError: if there is none, or its channels, widths or blocks differ.
    """
    path = folder / "source.safetensors"
    if not path.exists():
        raise RunError(
            f"{path}: no source network; make one with 'dwp-pyro fit-prior', name its folder by --prior-from, "
            "or do without (svi --centre none, finetune --init random)"
        )
    source = Posterior.load(path)
    for name in ("modalities", "widths", "short"):
        found, wanted = getattr(source.card, name), getattr(card, name)
        if found != wanted:
            raise RunError(
                f"{path}: the source network has {name} {found}, the target {wanted}; they must agree, or "
                "do without it (svi --centre none, finetune --init random)"
            )
    assert isinstance(source.network, ResidualUNet3d)
    return source.network.requires_grad_(True)
