"""`predict`: a segmentation and its uncertainty, in the scan's own space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.case import Case, Layout, read_case
from dwp_pyro.data.layouts import LAYOUTS, detect_layout, find_cases
from dwp_pyro.data.transforms import Preprocessing
from dwp_pyro.errors import DataError, RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.inference.posterior_predictive import posterior_predictive
from dwp_pyro.inference.svi import step_seed
from dwp_pyro.progress import progress
from dwp_pyro.report.figures import save_case_figure
from dwp_pyro.storage import atomic_path, read_json, write_json

__all__ = ["cases_to_predict", "is_predicted", "predict", "predict_cases"]

_MAPS = ("seg", "prob", "entropy", "mi")


def predict(
    run: Path,
    scans: Sequence[Path],
    config: PredictConfig,
    *,
    out: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Predict scans with a trained run.

    Writes, for each case and on its own grid and affine: `<case>_seg.nii.gz` (1 in the region),
    `_prob`, `_entropy` and `_mi` (nats), `<case>.png`, and `<case>.json`, written last.

    Args:
        run: folder of a finished `svi` or `finetune` run.
        scans: one folder of any known layout, or the files of one case, one a modality of the run, in its order.
        config: settings.
        out: folder of the predictions; `run/predictions` by default.
        device: to compute on.
        resume: leave cases that are done with the same settings as they are.
        overwrite: replace what is there.

    Returns:
        The pictures' paths.

    Raises:
        UserError: if the run or a scan is unfit, or a prediction exists; what is there is not touched.
    """
    posterior = load_run(run)
    cases, layout = cases_to_predict(scans, posterior)
    out = out or run / "predictions"
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out names a folder")
    done = [case for case in cases if (out / f"{case.id}.json").exists()]
    if done and not (resume or overwrite):
        raise RunError(
            f"{out}: already holds a prediction of '{done[0].id}'; give --overwrite to replace it, "
            "--resume to keep it, or another --out"
        )
    if resume:
        cases = [case for case in cases if not is_predicted(out, case.id, posterior, config)]
    return predict_cases(posterior, cases, layout, config, out, torch_device(device))


def load_run(run: Path) -> Posterior:
    """The posterior of a finished run.

    Raises:
        RunError: if the folder holds none.
    """
    path = run / "posterior.safetensors"
    if not run.is_dir():
        raise RunError(f"{run}: no such run; train one with 'dwp-pyro svi' or 'dwp-pyro finetune'")
    if not path.exists():
        raise RunError(
            f"{run}: holds no finished 'svi' or 'finetune' run (posterior.safetensors); finish it by --resume"
        )
    return Posterior.load(path)


def cases_to_predict(scans: Sequence[Path], posterior: Posterior) -> tuple[list[Case], Layout]:
    """The cases that a command line names, and their layout.

    Raises:
        DataError: if a path is missing, or the files do not match the modalities.
    """
    for path in scans:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if len(scans) == 1 and scans[0].is_dir():
        layout = detect_layout(scans[0])
        return find_cases(scans[0], layout), layout
    modalities = posterior.card.modalities
    if any(path.is_dir() for path in scans) or len(scans) != len(modalities):
        raise DataError(
            f"{scans[0]}: give one folder, or {len(modalities)} file(s) of one case, "
            f"in the order {', '.join(modalities)}; got {len(scans)} path(s)"
        )
    name = scans[0].name.removesuffix(".gz").removesuffix(".nii")
    return [Case(name, dict(zip(modalities, scans, strict=True)))], LAYOUTS[posterior.card.layout]


def is_predicted(out: Path, name: str, posterior: Posterior, config: PredictConfig) -> bool:
    """Whether a case has been predicted whole with these settings."""
    path = out / f"{name}.json"
    return path.exists() and read_json(path).get("settings") == _settings(posterior, config)


def predict_cases(
    posterior: Posterior,
    cases: Sequence[Case],
    layout: Layout,
    config: PredictConfig,
    out: Path,
    device: torch.device,
) -> list[Path]:
    """Predict cases into a folder, replacing what is there; returns the pictures' paths.

    Raises:
        DataError: if a scan is unfit; earlier cases are kept.
    """
    posterior.to(device)
    card = posterior.card
    preprocess = Preprocessing(card.spacing)
    settings = _settings(posterior, config)
    seeds = [step_seed(config.seed, sample) for sample in range(int(settings["samples"]))]
    # The label is drawn in the picture where its values mean the same structures as in training.
    values = layout.regions.get(card.region, frozenset())
    pictures = []
    with progress("predicting", len(cases) * len(seeds)) as advance:
        for case in cases:
            scan = read_case(case, card.modalities, layout.labels)
            example = preprocess(scan, values)
            moments = posterior_predictive(
                posterior,
                example.image.as_tensor().to(device),
                seeds,
                config.overlap,
                advance=partial(advance, case.id),
            )
            maps = torch.stack([moments.probability, moments.entropy, moments.mutual_information])
            probability, entropy, mutual_information = preprocess.invert(maps, example, scan)
            probability = np.clip(probability, 0, 1)
            segmentation = (probability > 0.5).astype(np.uint8)
            volumes = dict(zip(_MAPS, (segmentation, probability, entropy, mutual_information), strict=True))
            for name, volume in volumes.items():
                _save_like(scan.reference, volume, out / f"{case.id}_{name}.nii.gz")
            truth = np.isin(scan.label, sorted(values)) if scan.label is not None and values else None
            picture = out / f"{case.id}.png"
            save_case_figure(
                picture,
                f"{case.id}: {card.region}",
                scan.affine,
                scan.images[0],
                truth,
                probability,
                entropy,
                mutual_information,
            )
            voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
            write_json(
                out / f"{case.id}.json",
                {
                    "settings": settings,
                    "region": card.region,
                    "volume_ml": float(segmentation.sum()) * voxel_ml,
                    "mean_entropy_of_brain": float(entropy[scan.brain].mean()),
                    "mean_mutual_information_of_brain": float(mutual_information[scan.brain].mean()),
                },
            )
            pictures.append(picture)
    return pictures


def _settings(posterior: Posterior, config: PredictConfig) -> dict[str, int | float]:
    samples = config.samples if posterior.guide is not None else 1
    return {"samples": samples, "overlap": config.overlap, "seed": config.seed}


def _save_like(reference: Path, volume: NDArray[np.uint8] | NDArray[np.float32], path: Path) -> None:
    """Write a volume with the header of the scan: its affine, its codes, its units."""
    header: Any = nibabel.load(reference).header.copy()
    header.set_data_dtype(volume.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    image = nibabel.Nifti1Image(volume, None, header)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
