"""The settings of every command: frozen, checked at birth, in and out of YAML.

A setting is written once, here: the command line makes its options, help and defaults from these
fields. Only what changes a result is a setting; where and how a run happens is in `RunOptions`.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.distributions.priors import FAMILIES, LEARNED, PRIORS
from dwp_pyro.errors import ConfigError

__all__ = [
    "FinetuneConfig",
    "FitPriorConfig",
    "PredictConfig",
    "RunOptions",
    "Settings",
    "SviConfig",
    "data_root",
]

#: Names of the layouts; the layouts themselves, which need more imports, are in `data.layouts`.
DATASETS = (
    "brats",
    "brats2023-gli",
    "brats2024-gli",
    "brats-ped",
    "openms",
    "ms",
    "msseg2016",
    "isbi2015",
    "wmh2017",
    "mslesseg",
    "bids",
    "msd",
    "nnunet",
    "manifest",
)

#: Names of the networks; the networks themselves are in `models.networks`.
NETWORKS = ("residual-unet", "paper-unet", "unet", "segresnet", "dynunet", "basicunet")

#: What a run can be exported as; see `pipeline.export`.
EXPORT_FORMATS = ("monai-bundle", "nnunet")

DATA_VARIABLE = "DWP_PYRO_DATA"

_MAX_SEED = 2**32 - 1

_LARGEST = 10**15  # of any number: all below count exactly, and none overflows

_PRECISION = "Arithmetic of the network: bf16 is faster on a GPU, and on a CPU that has bfloat16."

_CENTRED_MEMBERS = 3

#: Independent observations that the segmentation of a case counts as.
DEFAULT_EVIDENCE = 50_000.0


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field with what the command line needs to make an option of it."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one command.

    Raises:
        ConfigError: if a value has the wrong type, or lies outside its choices or its range.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            name = item.name.replace("_", "-")
            if not _matches(value, hints[item.name]):
                raise ConfigError(f"{name}: expected {_describe(hints[item.name])}, got {reprlib.repr(value)}")
            choices, minimum, maximum = (item.metadata.get(key) for key in ("choices", "minimum", "maximum"))
            for part in value if isinstance(value, tuple) else (value,):
                if part is None:
                    continue
                if isinstance(part, int | float) and not abs(part) <= _LARGEST:
                    raise ConfigError(f"{name}: must be a number of at most {_LARGEST:g}, got {reprlib.repr(part)}")
                if choices and part not in choices:
                    raise ConfigError(f"{name}: '{part}' is not one of {', '.join(choices)}")
                if minimum is not None and not part >= minimum:
                    raise ConfigError(f"{name}: must be at least {minimum:g}, got {part:g}")
                if maximum is not None and not part <= maximum:
                    raise ConfigError(f"{name}: must be at most {maximum:.12g}, got {part:.12g}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Settings from plain values, as YAML holds them; lists become tuples, names may have dashes.

        Raises:
            ConfigError: if a name is unknown or a value does not fit.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise ConfigError(f"'{key}' is no setting of this command (settings: {', '.join(sorted(known))})")
            if isinstance(value, list):
                value = tuple(value)
            if isinstance(value, str) and hints[name] == tuple[str, ...] | None:
                value = (value,)
            if (
                isinstance(value, int)
                and not isinstance(value, bool)
                and hints[name] is float
                and abs(value) <= _LARGEST
            ):
                value = float(value)
            arguments[name] = value
        return cls(**arguments)

    @classmethod
    def from_yaml(cls, path: Path, **changes: Any) -> Self:
        """Settings from a YAML file, with some of them changed.

        Raises:
            ConfigError: naming the file, if it cannot be read or does not fit.
        """
        from dwp_pyro.storage import read_yaml  # here, so that --help does not wait for it

        values = {name.replace("-", "_"): value for name, value in read_yaml(path, ConfigError).items()}
        try:
            return cls.from_mapping({**values, **changes})
        except ConfigError as problem:
            raise ConfigError(f"{path}: {problem}") from problem

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for YAML and JSON."""
        plain = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            plain[item.name] = list(value) if isinstance(value, tuple) else value
        return plain


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _matches(value: Any, hint: Any) -> bool:
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is tuple:
            part = typing.get_args(kind)[0]
            if isinstance(value, tuple) and value and all(_matches(item, part) for item in value):
                return True
        elif kind is float:
            if isinstance(value, float | int) and not isinstance(value, bool):
                return True
        elif kind is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif isinstance(value, kind):
            return True
    return False


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "nothing"}
    parts = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is tuple:
            parts.append(f"a list, each {words[typing.get_args(kind)[0]]}")
        else:
            parts.append(words[kind])
    return " or ".join(parts)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    default_dataset: ClassVar[str] = "brats"

    dataset: str | None = setting(
        None, "Layout of the scans (docs/data.md).  [default: told from --root; without it, brats]", choices=DATASETS
    )
    root: str | None = setting(
        None,
        "Folder of the scans, or a CSV file that lists them.  "
        "[default: $DWP_PYRO_DATA/<dataset>, else ./data/<dataset>]",
    )
    label_map: tuple[str, ...] | None = setting(
        None,
        "What label values mean, as 1=oedema,2=necrosis,3=enhancing; 'ignore' leaves voxels out of loss and score.  "
        "[default: as the layout says]",
    )
    split: str | None = setting(
        None, "JSON file with the case ids of 'train', 'test' and, if you like, 'validation'.  [default: by seed]"
    )
    validation: int = setting(
        4, "Validation cases (patients, where one has several scans), where the split file names none.", minimum=0
    )
    modality: tuple[str, ...] = setting(("flair",), "Modalities, by commas: flair, t1, t1ce, t2.")
    region: tuple[str, ...] | None = setting(
        None,
        "What to segment, several by commas: whole, core, enhancing of a tumour; lesion; or a label's own name. "
        "Regions that share no label value exclude each other.  [default: the whole of a tumour, else every label]",
    )
    spacing: float | None = setting(
        None,
        "Resample to cubic voxels of this side, in mm; 0 keeps those of the scans.  [default: the finest side of the "
        "scans, or coarser, until a patch is as long as the structures and half as long as the brain]",
        minimum=0,
    )
    patch: int = setting(
        32,
        "Side of a training patch, in voxels; smaller scans are taken whole. A larger one allows smaller voxels.",
        minimum=16,
    )
    mirror: tuple[str, ...] = setting(
        ("x",),
        "Axes along which half of the patches are mirrored: x left-right, y front-back, z up-down, by commas; or none.",
        choices=("x", "y", "z", "none"),
    )
    seed: int = setting(
        0, "Seed of the split, the initialisation, the patches and every sample.", minimum=0, maximum=_MAX_SEED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spacing is not None and not self.spacing < 1000:
            raise ConfigError(f"spacing: must be a number of mm below 1000, got {self.spacing:g}")
        if "none" in self.mirror and len(self.mirror) > 1:
            raise ConfigError(f"mirror: 'none' stands alone, got {','.join(self.mirror)}")
        if not all(self.modality):
            raise ConfigError("modality: an empty name; give for example flair or t1,flair")
        parse_label_map(self.label_map or ())
        for name, values in (
            ("modality", self.modality),
            ("region", self.region or ()),
            ("mirror", self.mirror),
        ):
            if len(set(values)) != len(values):
                raise ConfigError(f"{name}: named twice in {','.join(values)}")

    @property
    def scans(self) -> tuple[Path, str | None]:
        """Where the scans lie, and their layout; None if it is to be told from the folder."""
        if self.root is not None:
            return Path(self.root), self.dataset
        dataset = self.dataset or self.default_dataset
        return data_root(dataset, None), dataset


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(DataSettings):
    network: str = setting(
        "residual-unet",
        "A residual U-Net, the form of it that the deep-weight-prior paper published (paper-unet), or one of MONAI's.",
        choices=NETWORKS,
    )
    widths: tuple[int, ...] = setting(
        (16, 32, 64, 128), "Channels of the network at its four resolutions, by commas.", minimum=1, maximum=4096
    )
    blocks: str | None = setting(
        None,
        "YAML file that puts the network's kernels into prior blocks: block: [prefix of parameter names, ...].  "
        "[default: by the resolution of what they look at]",
    )
    modality_dropout: float = setting(
        0.0,
        "Probability with which a modality is left out of a training patch (one stays). Above 0, scans may lack "
        "modalities: in training, and when predicted.",
        minimum=0,
        maximum=0.9,
    )
    likelihood: str = setting("dice-ce", "Likelihood of a segmentation.", choices=("dice-ce", "categorical"))
    dice_weight: float = setting(
        0.5, "Share of the Dice loss in dice-ce, beside the cross-entropy.", minimum=0, maximum=1
    )
    steps: int = setting(300, "Optimisation steps.", minimum=1)
    batch_size: int = setting(2, "Patches a step.", minimum=1, maximum=4096)
    learning_rate: float = setting(4e-3, "Highest learning rate of AdamW.", minimum=0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW, on deterministic weights.", minimum=0)
    precision: str = setting("float32", _PRECISION, choices=("float32", "bf16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) != 4:
            raise ConfigError(f"widths: must be four numbers, got {','.join(map(str, self.widths))}")
        if self.likelihood == "categorical" and self.dice_weight != 0.5:
            raise ConfigError("dice-weight: is a setting of dice-ce; leave it out for categorical")
        first = self.widths[0]
        if self.network == "segresnet" and (first % 8 or self.widths != tuple(first * 2**level for level in range(4))):
            raise ConfigError(
                "widths: of segresnet must double, from a multiple of 8 (as 16,32,64,128); "
                f"got {','.join(map(str, self.widths))}"
            )


@dataclass(frozen=True, kw_only=True)
class FitPriorConfig(TrainingSettings):
    """Settings of `fit-prior`."""

    default_dataset: ClassVar[str] = "ms"

    dataset: str | None = setting(
        None,
        "Layout of the source scans (docs/data.md).  [default: told from --root; without it, ms]",
        choices=DATASETS,
    )
    kernels: str | None = setting(
        None, "Fit to these kernels instead of training source networks: a .safetensors bank or an .npy array."
    )
    steps: int = setting(2000, "Optimisation steps of each source network.", minimum=1)
    bootstraps: int = setting(
        3, "Source networks, each trained on a bootstrap of the cases.", minimum=1, maximum=10_000
    )
    snapshots: int = setting(
        2, "Learning-rate cycles of a source network; a snapshot is taken after each.", minimum=1, maximum=10_000
    )
    weight_decay: float = setting(0.1, "Weight decay of AdamW; it lets kernels forget their start.", minimum=0)
    family: str = setting(
        "dwp",
        "Density of a block's kernels: a VAE (dwp), a full-covariance Gaussian or a mixture of them, a flow; auto "
        "fits all and keeps the best on held-out kernels.",
        choices=(*FAMILIES, "auto"),
    )
    latent_size: int = setting(8, "Latent size of the kernel VAEs.", minimum=1, maximum=4096)
    hidden: tuple[int, ...] = setting((32,), "Hidden widths of the kernel VAEs, by commas.", minimum=1, maximum=4096)
    vae_steps: int = setting(2000, "Optimisation steps of a kernel VAE or flow.", minimum=1)
    source: str | None = setting(
        None, "Data set that the kernels come from and its citation, for the prior's card.  [default: not stated]"
    )
    licence: str | None = setting(None, "Licence of the prior, for its card.  [default: not stated]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snapshots > self.steps:
            raise ConfigError(f"snapshots: {self.snapshots} cycles need as many steps, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class TargetSettings(TrainingSettings):
    n: int = setting(
        5, "Training cases (patients, where one has several scans): the first n of the seed's permutation.", minimum=1
    )
    steps: int = setting(600, "Optimisation steps, of all members together.", minimum=1)
    members: int | None = setting(
        None,
        "Members of the posterior, an equal mixture; each learns from a source network, or a start, of its own.  "
        "[default: 3 for a prior around the source, or as many as there are; else 1]",
        minimum=1,
        maximum=10_000,
    )
    prior_from: str = setting("runs/prior-ms", "Folder made by fit-prior: the kernel prior, and the source networks.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members is not None and self.steps < self.members:
            raise ConfigError(
                f"steps: {self.members} members need as many steps, got {self.steps}; give fewer --members"
            )

    def _learned_files(self, *, prior: bool, source: bool) -> tuple[Path, ...]:
        chosen = {"prior.safetensors": prior, "source.safetensors": source}
        files = [Path(self.prior_from) / name for name, needed in chosen.items() if needed]
        return (*files, *([] if self.blocks is None else [Path(self.blocks)]))


@dataclass(frozen=True, kw_only=True)
class SviConfig(TargetSettings):
    """Settings of `svi`."""

    steps: int = setting(900, "Optimisation steps, of all members together.", minimum=1)
    prior: str = setting("dwp", "Prior of the kernels.", choices=PRIORS)
    centre: str | None = setting(
        None,
        "Put the prior around the kernels of the source network, or leave it where it was learned.  "
        "[default: source for a learned prior, else none]",
        choices=("source", "none"),
    )
    prior_scale: float | None = setting(
        None,
        "Factor of the prior's spread around its centre, the same in every block.  [default: learned in each block; of "
        "normal and log-uniform 1]",
        minimum=1e-6,
    )
    particles: int = setting(
        1,
        "Samples K of the bound on the density of a VAE (dwp): more are tighter, and cost more.",
        minimum=1,
        maximum=10_000,
    )
    train_reverse_model: bool = setting(
        False, "Train the reverse model r(z|w) of the VAE (dwp) along with the posterior, which tightens the bound."
    )
    init: str | None = setting(
        None,
        "First posterior means: draws of the kernel prior, the source network, or a random start of the network.  "
        "[default: source for a centred prior, prior for a learned one, else random]",
        choices=("prior", "source", "random"),
    )
    init_scale: float = setting(
        0.03,
        "First posterior standard deviation, as a fraction of the size of its block's kernels, and at most the "
        "prior's; under normal and log-uniform, as a fraction of the site's first means.",
        minimum=1e-6,
    )
    estimator: str = setting(
        "shared", "One weight sample a step, or local reparameterisation.", choices=("shared", "local")
    )
    evidence: float = setting(
        DEFAULT_EVIDENCE,
        "Independent observations that the segmentation of one case counts as. More of them make the prior weigh less.",
        minimum=1e-6,
    )
    anneal: float = setting(
        0.25, "Fraction of the steps over which the weight of the KL term rises from 0 to 1.", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anneal > 1:
            raise ConfigError(f"anneal: is a fraction of the steps, from 0 to 1, got {self.anneal:g}")
        if self.prior != "dwp" and (self.particles > 1 or self.train_reverse_model):
            raise ConfigError(f"prior: '{self.prior}' is no VAE; leave --particles and --train-reverse-model out")
        if self.prior == "log-uniform" and (self.centre == "source" or self.prior_scale not in (None, 1)):
            raise ConfigError("prior: log-uniform has no centre and no scale; leave --centre and --prior-scale out")

    def resolved(self) -> SviConfig:
        """The settings with every default that depends on another one filled in."""
        learned = self.prior in LEARNED
        centre = self.centre or ("source" if learned else "none")
        return dataclasses.replace(
            self,
            centre=centre,
            init=self.init or ("source" if centre == "source" else "prior" if learned else "random"),
            members=self.members or (min(_CENTRED_MEMBERS, self.steps) if centre == "source" else 1),
        )

    def learned_from(self) -> tuple[Path, ...]:
        """The files that a run reads, beside scans: of a prior's folder, and of blocks."""
        full = self.resolved()
        return self._learned_files(
            prior=full.prior in LEARNED or full.init == "prior", source="source" in (full.centre, full.init)
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TargetSettings):
    """Settings of `finetune`: the deterministic arms."""

    init: str = setting(
        "random",
        "First weights: a random start of the network, the source network's, or kernels drawn from the kernel prior.",
        choices=("random", "source", "prior"),
    )
    train: str = setting("all", "Train every block, or the first and last alone.", choices=("all", "ends"))
    l2_sp: float = setting(
        0.0, "L2-SP: weight α of the penalty α/2 · Σ (w − source w)², in nats, on every weight.", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train == "ends" and self.init != "source":
            raise ConfigError("train: 'ends' keeps the other blocks as they start, which needs --init source")
        if self.blocks is not None and self.init != "prior":
            raise ConfigError("blocks: say which prior draws a kernel, which needs --init prior")
        if self.l2_sp and self.init != "source":
            raise ConfigError("l2-sp: pulls towards the source network, which needs --init source")

    def learned_from(self) -> tuple[Path, ...]:
        """The files that a run reads, beside scans: of a prior's folder, and of blocks."""
        return self._learned_files(prior=self.init == "prior", source=self.init == "source")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Settings):
    """Settings of `predict`, and of the predictions `evaluate` makes."""

    samples: int = setting(
        20,
        "Weight samples S, rounded up to a multiple of the members; a deterministic member needs one.  0 takes each "
        "member once, at its posterior means: for a mixture nearly the same maps, in a few passes (of one member, no "
        "mutual information).",
        minimum=0,
    )
    overlap: float = setting(0.25, "Overlap of neighbouring windows, as a part of a window.", minimum=0)
    seed: int = setting(0, "Seed of the weight samples.", minimum=0, maximum=_MAX_SEED)
    precision: str = setting("float32", _PRECISION, choices=("float32", "bf16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap >= 1:
            raise ConfigError(f"overlap: must be below 1, got {self.overlap:g}")


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run happens; nothing here changes its result.

    Args:
        out: folder of the run.
        device: "auto", "cpu", "cuda" or "cuda:1".
        resume: go on with an unfinished run.
        overwrite: replace a former run of the same command.
        mlflow: log settings, figures and files to MLflow too.
    """

    out: Path
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    mlflow: bool = False


def data_root(dataset: str, root: str | None) -> Path:
    """The folder of a dataset: as given, or `$DWP_PYRO_DATA/<dataset>`, or `./data/<dataset>`."""
    if root is not None:
        return Path(root)
    return Path(os.environ.get(DATA_VARIABLE, "data")) / dataset
