"""Settings of the training commands."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from dwp_pyro.config.base import PRECISION_HELP, setting
from dwp_pyro.config.data import DataConfig
from dwp_pyro.config.names import FAMILIES, LEARNED, MAX_UNITS, PRIORS
from dwp_pyro.runtime.errors import ConfigError

__all__ = [
    "DEFAULT_EVIDENCE",
    "DEFAULT_WIDTHS",
    "NETWORK_NAMES",
    "PRETRAINED",
    "FinetuneConfig",
    "FitPriorConfig",
    "SviConfig",
    "TrainingConfig",
    "named_prior",
]

#: Names of the networks in `models.registry`.
NETWORK_NAMES = ("residual-unet", "paper-unet", "unet", "segresnet", "dynunet", "basicunet", "mednext", "mednext-7")

#: Channels of a network without a source network.
DEFAULT_WIDTHS = (16, 32, 64, 128)

#: Prior and source networks that come with the package.
PRETRAINED = Path(__file__).parents[1] / "pretrained" / "ms"
_PRETRAINED = "pretrained"  # its name as a setting

_DELTA, _CLIP = 1e-5, 2.0

_CENTERED_MEMBERS = 3

#: Number of independent observations that the segmentation of one case counts as.
DEFAULT_EVIDENCE = 50_000.0


def named_prior(name: str) -> Path:
    """Return the folder of a prior from its name: a path, or "pretrained" for that of the package."""
    return PRETRAINED if name == _PRETRAINED else Path(name)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(DataConfig):
    """Settings of networks and optimization."""

    network: str = setting(
        "residual-unet",
        "Network: a residual U-Net, the U-Net of the deep-weight-prior paper (paper-unet), or a network of MONAI.",
        choices=NETWORK_NAMES,
    )
    widths: tuple[int, ...] | None = setting(
        None,
        "Channels at the four resolutions of the network, comma-separated.  [default: those of the source network, if "
        f"training uses one; otherwise {','.join(map(str, DEFAULT_WIDTHS))}]",
        minimum=1,
        maximum=4096,
    )
    blocks: str | None = setting(
        None,
        "YAML file that assigns the network's kernels to prior blocks: block: [prefix of parameter names, ...].  "
        "[default: by the resolution of their input]",
    )
    modality_dropout: float = setting(
        0.0,
        "Probability of dropping a modality of a training patch (at least one stays). Above 0, scans may lack "
        "modalities in training and prediction.",
        minimum=0,
        maximum=0.9,
    )
    likelihood: str = setting("dice-ce", "Likelihood of a segmentation.", choices=("dice-ce", "categorical"))
    dice_weight: float = setting(
        0.5, "Weight of the Dice loss in dice-ce; the cross-entropy has the rest.", minimum=0, maximum=1
    )
    steps: int = setting(300, "Optimization steps.", minimum=1)
    batch_size: int = setting(1, "Patches per step.", minimum=1, maximum=4096)
    learning_rate: float = setting(4e-3, "Peak learning rate of AdamW.", minimum=0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW on deterministic weights.", minimum=0)
    precision: str = setting("float32", PRECISION_HELP, choices=("float32", "bf16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.widths or DEFAULT_WIDTHS
        if len(widths) != 4:
            raise ConfigError(f"widths: must be four numbers, got {','.join(map(str, widths))}")
        if self.likelihood == "categorical" and self.dice_weight != 0.5:
            raise ConfigError("dice-weight: is a setting of dice-ce; omit it for categorical")
        doubled = tuple(widths[0] * 2**level for level in range(4))
        multiple = {"segresnet": 8, "mednext": 1, "mednext-7": 1}.get(self.network)
        if multiple is not None and (widths[0] % multiple or widths != doubled):
            raise ConfigError(
                f"widths: {self.network} needs widths that double, from a multiple of {multiple} (as 16,32,64,128); "
                f"got {','.join(map(str, widths))}"
            )


@dataclass(frozen=True, kw_only=True)
class FitPriorConfig(TrainingConfig):
    """Settings of `fit-prior`.

    Examples:
        >>> from dwp_pyro import FitPriorConfig
        >>> FitPriorConfig(root="data/ms", bootstraps=2).family
        'dwp'
    """

    default_dataset: ClassVar[str] = "ms"
    patch_over_brain: ClassVar[float] = 0.5

    more_roots: tuple[str, ...] | None = setting(
        None, "Further data sets, in layouts that are detected.", repeats="root"
    )
    kernels: str | None = setting(
        None, "Kernels to fit to instead of training source networks: a .safetensors bank or an .npy array."
    )
    # Two smaller patches make networks from which a target starts better (docs/results.md), in less time.
    patch: int = setting(32, "Side of a training patch, in voxels; smaller scans are used whole.", minimum=16)
    batch_size: int = setting(2, "Patches per step.", minimum=1, maximum=4096)
    steps: int = setting(2000, "Optimization steps of each source network.", minimum=1)
    bootstraps: int = setting(
        3, "Number of source networks, each trained on a bootstrap of the cases.", minimum=1, maximum=10_000
    )
    snapshots: int = setting(
        2, "Learning-rate cycles of a source network, with a snapshot after each.", minimum=1, maximum=10_000
    )
    weight_decay: float = setting(
        0.1, "Weight decay of AdamW; it reduces the influence of the initialization on the kernels.", minimum=0
    )
    randomize: bool = setting(
        False,
        "Randomize the domain of the scans: other contrasts, bias fields and resolutions, and lesions of other cases.",
    )
    family: str = setting(
        "dwp",
        "Density of a block's kernels: a VAE (dwp), a full-covariance Gaussian, a mixture of Gaussians or a flow; auto "
        "fits all and keeps the best on held-out kernels.",
        choices=(*FAMILIES, "auto"),
    )
    latent_size: int = setting(8, "Latent size of the kernel VAEs.", minimum=1, maximum=4096)
    hidden: tuple[int, ...] = setting(
        (32,), "Hidden widths of the kernel VAEs, comma-separated.", minimum=1, maximum=4096
    )
    density_steps: int = setting(2000, "Optimization steps of a kernel VAE or flow.", minimum=1)
    epsilon: float | None = setting(
        None,
        "Make a Gaussian prior (ε, δ)-differentially private with this ε; the unit is one source network.  "
        "[default: no noise]",
        minimum=1e-6,
    )
    delta: float = setting(_DELTA, "δ of a private prior.", minimum=1e-12, maximum=0.5)
    clip: float = setting(
        _CLIP,
        "Bound on the norm of a source network's second moments in a private prior, from public knowledge; networks of "
        "the prior that comes with the package have 1.8 to 2.4.",
        minimum=1e-6,
    )
    source: str | None = setting(
        None, "Data set of the kernels and its citation, for the prior's card.  [default: not stated]"
    )
    license: str | None = setting(None, "License of the prior, for its card.  [default: not stated]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snapshots > self.steps:
            raise ConfigError(f"snapshots: {self.snapshots} cycles need as many steps, got {self.steps}")
        if self.epsilon is not None and self.family != "gaussian":
            raise ConfigError(
                f"epsilon: only a prior of the family 'gaussian' can be private, got '{self.family}'; "
                "choose that family or omit epsilon"
            )
        if self.epsilon is None and (self.delta, self.clip) != (_DELTA, _CLIP):
            raise ConfigError("delta, clip: are settings of a private prior; give epsilon, too, or omit them")
        if self.kernels is not None and (self.root is not None or self.more_roots):
            raise ConfigError("kernels: are fitted without scans; omit root")
        if self.latent_size + sum(self.hidden) > MAX_UNITS:
            raise ConfigError(f"hidden: latent-size and all hidden widths together must not exceed {MAX_UNITS}")


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TrainingConfig, ABC):
    """Settings of training on the target scans."""

    n: int = setting(
        5, "Training cases (patients, if some have several scans): the first n of the seed's permutation.", minimum=1
    )
    steps: int = setting(600, "Optimization steps of all members together.", minimum=1)
    members: int | None = setting(
        None,
        "Members of the posterior, an equal mixture; each starts from its own source network or initialization.  "
        "[default: up to 3 in svi with a prior centered on the source, otherwise 1]",
        minimum=1,
        maximum=10_000,
    )
    prior_dir: str | None = setting(
        None,
        "Output folder of fit-prior, with the kernel prior and the source networks; pretrained for those that come "
        "with the package, for FLAIR.  [default: runs/prior-ms, if it exists; otherwise pretrained]",
    )
    unlabelled: str | None = setting(
        None,
        "Folder or CSV file of further scans. After a first round of training the posterior labels them where it is "
        "certain, and a second round trains on all. Their own labels are not read, and the scans of the split are left "
        "out (but not copies of them).  [default: none]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members is not None and self.steps < self.members:
            raise ConfigError(f"steps: {self.members} members need as many steps, got {self.steps}; lower members")

    @property
    def prior_folder(self) -> Path:
        """Folder of the prior and the source networks."""
        own = Path("runs/prior-ms")
        return named_prior(self.prior_dir or (str(own) if own.exists() else _PRETRAINED))

    def resolve_prior(self) -> Self:
        """Return the settings with `prior_dir` filled in if they use it: another command may make one during a run."""
        if self.prior_dir is not None or not self.learned_from():
            return self
        folder = self.prior_folder
        return dataclasses.replace(self, prior_dir=_PRETRAINED if folder == PRETRAINED else str(folder))

    @abstractmethod
    def learned_from(self) -> tuple[Path, ...]:
        """Return the files that a run reads besides the scans: those of the prior and of the blocks."""

    def _learned_files(self, *, prior: bool, source: bool) -> tuple[Path, ...]:
        chosen = {"prior.safetensors": prior, "source.safetensors": source}
        files = [self.prior_folder / name for name, needed in chosen.items() if needed]
        return (*files, *([] if self.blocks is None else [Path(self.blocks)]))


@dataclass(frozen=True, kw_only=True)
class SviConfig(TargetConfig):
    """Settings of `svi`.

    Examples:
        >>> from dwp_pyro import SviConfig
        >>> SviConfig(root="data/brats", prior="dwp").resolve().center
        'source'
    """

    steps: int = setting(1200, "Optimization steps of all members together.", minimum=1)
    prior: str = setting(
        "isotropic",
        "Prior of the kernels: independent weights (isotropic, normal, he), a density learned by fit-prior (dwp, a "
        "VAE; gaussian; mixture; flow), or log-uniform.",
        choices=PRIORS,
    )
    center: str | None = setting(
        None,
        "Center of the prior: the kernels of the source network, or none to keep the learned location.  "
        "[default: source for dwp, gaussian, mixture, flow and isotropic, otherwise none]",
        choices=("source", "none"),
    )
    prior_scale: float | None = setting(
        None,
        "Scale factor of the prior around its center, common to all blocks.  [default: learned per block; 1 for "
        "normal, he and log-uniform]",
        minimum=1e-6,
    )
    particles: int = setting(
        1,
        "Samples K of the bound on the density of a VAE (dwp); more make it tighter and slower.",
        minimum=1,
        maximum=10_000,
    )
    train_reverse_model: bool = setting(
        False, "Train the reverse model r(z|w) of the VAE (dwp) with the posterior, which tightens the bound."
    )
    init: str | None = setting(
        None,
        "Initial posterior means: samples of the kernel prior, the source network, or a random initialization.  "
        "[default: source for a centered prior, prior for another learned prior, otherwise random]",
        choices=("prior", "source", "random"),
    )
    init_scale: float = setting(
        0.03,
        "Initial posterior standard deviation, as a fraction of the size of its block's kernels and at most the "
        "prior's; for normal, he and log-uniform, as a fraction of the site's initial means.",
        minimum=1e-6,
    )
    estimator: str = setting(
        "weight-sample", "One weight sample per step, or local reparameterization.", choices=("weight-sample", "local")
    )
    evidence: float = setting(
        DEFAULT_EVIDENCE,
        "Number of independent observations that the segmentation of one case counts as. More reduce the weight of the "
        "prior.",
        minimum=1e-6,
    )
    anneal: float = setting(
        0.25, "Fraction of the steps over which the weight of the KL term rises from 0 to 1.", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior != "dwp" and (self.particles > 1 or self.train_reverse_model):
            raise ConfigError(f"prior: '{self.prior}' is not a VAE; omit particles and train-reverse-model")
        if self.prior == "log-uniform" and (self.center == "source" or self.prior_scale not in (None, 1)):
            raise ConfigError("prior: log-uniform has no center and no scale; omit center and prior-scale")

    def resolve(self) -> SviConfig:
        """Return the settings with the defaults that depend on other settings."""
        learned = self.prior in LEARNED
        center = self.center or ("source" if learned else "none")
        return dataclasses.replace(
            self,
            center=center,
            init=self.init or ("source" if center == "source" else "prior" if learned else "random"),
            members=self.members or (min(_CENTERED_MEMBERS, self.steps) if center == "source" else 1),
        )

    def learned_from(self) -> tuple[Path, ...]:
        """Return the files that a run reads besides the scans: those of the prior and of the blocks."""
        full = self.resolve()
        return self._learned_files(
            prior=full.prior in LEARNED or full.init == "prior", source="source" in (full.center, full.init)
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TargetConfig):
    """Settings of `finetune`, the deterministic methods.

    Examples:
        >>> from dwp_pyro import FinetuneConfig
        >>> FinetuneConfig(root="data/brats", init="source", l2_sp=10_000.0).trainable
        'all'
    """

    init: str = setting(
        "random",
        "Initial weights: a random initialization, the source network, or kernels sampled from the kernel prior.",
        choices=("random", "source", "prior"),
    )
    trainable: str = setting("all", "Train every block, or only the first and the last.", choices=("all", "first-last"))
    l2_sp: float = setting(
        0.0, "Weight α of the L2-SP penalty α/2 · Σ (w − source w)² on all weights, in nats.", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable == "first-last" and self.init != "source":
            raise ConfigError(
                "trainable: 'first-last' keeps the other blocks at their initial weights; it needs init 'source'"
            )
        if self.blocks is not None and self.init != "prior":
            raise ConfigError("blocks: needs init 'prior', which samples kernels from the blocks of a prior")
        if self.l2_sp and self.init != "source":
            raise ConfigError("l2-sp: needs init 'source', the network that the penalty refers to")

    def learned_from(self) -> tuple[Path, ...]:
        """Return the files that a run reads besides the scans: those of the prior and of the blocks."""
        return self._learned_files(prior=self.init == "prior", source=self.init == "source")
