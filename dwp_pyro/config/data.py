"""Settings of the scans of a command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dwp_pyro.config.base import MAX_SEED, Settings, setting
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.runtime.errors import ConfigError

__all__ = ["DATASETS", "DataConfig", "data_root"]

#: Names of the layouts in `data.layouts`, repeated here because importing those is slow.
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


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings of the scans, their split and their patches."""

    default_dataset: ClassVar[str] = "brats"
    patch_over_brain: ClassVar[float] = 0.8  # least length of a patch; see `choose_spacing`

    dataset: str | None = setting(
        None,
        "Layout of the scans (docs/reference/layouts.md).  [default: detected from --root; without it, ms for "
        "fit-prior, else brats]",
        choices=DATASETS,
    )
    root: str | None = setting(
        None,
        "Folder of the scans, or CSV file that lists them.  [default: $DWP_PYRO_DATA/<dataset>, else ./data/<dataset>]",
    )
    label_map: tuple[str, ...] | None = setting(
        None,
        "Names of the label values, as 1=oedema,2=necrosis,3=enhancing; loss and metrics exclude 'ignore'.  "
        "[default: those of the layout]",
    )
    split: str | None = setting(
        None, "JSON file with the case ids of 'train', 'test' and optionally 'validation'.  [default: by seed]"
    )
    validation: int = setting(
        4, "Validation cases (patients, if some have several scans); ignored if the split file names them.", minimum=0
    )
    modality: tuple[str, ...] = setting(("flair",), "Modalities, comma-separated, for example flair,t1,t1ce.")
    region: tuple[str, ...] | None = setting(
        None,
        "Regions to segment, comma-separated: whole, core, enhancing of a tumor; lesion; or the name of a label. "
        "Regions without common label values exclude each other.  [default: the whole tumor, otherwise every label]",
    )
    spacing: float | None = setting(
        None,
        "Side of the cubic voxels to resample to, in mm; 0 keeps those of the scans.  [default: the finest side of the "
        "scans, or coarser, so that a patch is 1.5 times as long as the structures and 0.8 times as long as the brain, "
        "0.5 times for fit-prior]",
        minimum=0,
    )
    patch: int = setting(
        48,
        "Side of a training patch, in voxels; smaller scans are used whole. Larger patches allow smaller voxels.",
        minimum=16,
    )
    mirror: tuple[str, ...] = setting(
        ("x",),
        "Axes along which half of the patches are mirrored, comma-separated: x left-right, y front-back, z up-down; or "
        "none.",
        choices=("x", "y", "z", "none"),
    )
    seed: int = setting(
        0, "Seed of the initialization, the patches, all samples and the split.", minimum=0, maximum=MAX_SEED
    )
    split_seed: int | None = setting(
        None,
        "Seed of the split alone, so that runs of several seeds have the same cases.  [default: the seed]",
        minimum=0,
        maximum=MAX_SEED,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spacing is not None and not self.spacing < 1000:
            raise ConfigError(f"spacing: must be a number of mm below 1000, got {self.spacing:g}")
        if "none" in self.mirror and len(self.mirror) > 1:
            raise ConfigError(f"mirror: 'none' excludes other axes, got {','.join(self.mirror)}")
        object.__setattr__(self, "modality", tuple(modality_name(name) for name in self.modality))
        if not all(self.modality):
            raise ConfigError("modality: has an empty name; expected for example flair or t1,flair")
        parse_label_map(self.label_map or ())
        for name in ("modality", "region", "mirror"):
            values = getattr(self, name) or ()
            if len(set(values)) != len(values):
                raise ConfigError(f"{name}: has a duplicate in {','.join(values)}")

    @property
    def scans(self) -> tuple[Path, str | None]:
        """Folder of the scans, and their layout; None to detect it from the folder."""
        layout = self.dataset or (None if self.root is not None else self.default_dataset)
        return data_root(layout or "", self.root), layout


def data_root(dataset: str, root: str | None) -> Path:
    """Return the folder of a dataset: `root`, else `$DWP_PYRO_DATA/<dataset>`, else `./data/<dataset>`."""
    if root is not None:
        return Path(root)
    return Path(os.environ.get("DWP_PYRO_DATA", "data")) / dataset
