"""`predict`: a segmentation and its uncertainty, in the scan's own space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.case import Case, Scan, read_case, read_volume
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import fitting, open_dataset
from dwp_pyro.data.transforms import Preprocessing
from dwp_pyro.errors import DataError, RunError
from dwp_pyro.inference.device import PREDICTS_IN_LESS, torch_device, warn_of_emulation, within_memory
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.inference.posterior_predictive import Moments, posterior_predictive
from dwp_pyro.inference.svi import step_seed
from dwp_pyro.progress import message, progress
from dwp_pyro.report.figures import save_case_figure
from dwp_pyro.signals import resumable
from dwp_pyro.storage import atomic_path, file_digest, locked, read_json, write_json

__all__ = [
    "Prediction",
    "TrainedRun",
    "cases_to_predict",
    "known_regions",
    "label_values",
    "label_volume",
    "load_run",
    "map_path",
    "not_predicted",
    "painting_order",
    "predict",
    "predict_case",
    "predict_cases",
    "read_figures",
    "read_maps",
    "read_scan",
    "save_like",
    "shown_image",
]


def predict(
    run: Path,
    scans: Sequence[Path],
    config: PredictConfig,
    *,
    out: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, list[Path]]:
    """Predict scans with a trained run.

    Writes, for each case and on its own grid and affine: `<case>_seg.nii.gz` (see `label_values`),
    `_prob`, `_entropy` and `_mi` (nats), `<case>.png`, and `<case>.json`, written last. Of several regions
    all but `_seg` are there for each, as `<case>_prob_core.nii.gz`.

    Args:
        run: folder of a finished `svi` or `finetune` run.
        scans: one folder of any known layout, one CSV file that lists scans, or the files of one case, one a modality
            of the run, in its order.
        config: settings.
        out: folder of the predictions; `run/predictions` by default.
        device: to compute on.
        resume: leave cases that are done with the same settings as they are.
        overwrite: replace what is there.

    Returns:
        Case → its pictures, one a region.

    Raises:
        UserError: if the run or a scan is unfit, or a prediction exists; what is there is not touched.

    Example:
        With the run of `svi`'s example:

        >>> from pathlib import Path
        >>> from dwp_pyro import PredictConfig, predict
        >>> pictures = predict(Path("runs/svi"), [Path("data/brats")], PredictConfig(samples=2), out=Path("maps"))
        >>> len(pictures), len(list(Path("maps").glob("*_mi.nii.gz")))
        (9, 9)
    """
    trained = load_run(run)
    data = cases_to_predict(scans, trained.posterior)
    cases = list(data.cases)
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
        cases = not_predicted(out, cases, trained, config)
    with progress("checking scans", len(cases)) as advance:
        for number, case in enumerate(cases):  # all of them, before anything is written
            cases[number] = _fit_to_predict(case, trained.posterior.card, data)
            advance("")
    with resumable():
        return predict_cases(trained, cases, data, config, out, torch_device(device))


class TrainedRun(NamedTuple):
    """A finished run: its posterior, and the digest of the posterior's file."""

    posterior: Posterior
    digest: str


def load_run(run: Path) -> TrainedRun:
    """The posterior of a finished run.

    Raises:
        RunError: if the folder holds none.
    """
    path = run / "posterior.safetensors"
    if not run.is_dir():
        raise RunError(f"{run}: no such run; train one with 'dwp-pyro svi' or 'dwp-pyro finetune'")
    if (run / "prior.json").exists():
        raise RunError(f"{run}: is a run of 'fit-prior'; give one of 'svi' or 'finetune'")
    if not path.exists():
        raise RunError(
            f"{run}: holds no finished 'svi' or 'finetune' run (posterior.safetensors); finish it by --resume"
        )
    return TrainedRun(Posterior.load(path), file_digest(path))


def cases_to_predict(scans: Sequence[Path], posterior: Posterior) -> DataSet:
    """The cases that a command line names.

    Raises:
        DataError: if a path is missing, or the files do not match the modalities.
    """
    for path in scans:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give a folder of scans, a CSV file, or a case's files")
    if len(scans) == 1 and (scans[0].is_dir() or scans[0].suffix.casefold() == ".csv"):
        # Where names alone do not tell, the layout that the network knows.
        layout = posterior.card.layout if posterior.card.layout in fitting(scans[0]) else None
        return open_dataset(scans[0], layout, needs_labels=False)
    modalities = posterior.card.modalities
    if any(path.is_dir() for path in scans) or len(scans) != len(modalities):
        raise DataError(
            f"{scans[0]}: give one folder or CSV file, or {len(modalities)} file(s) of one case, "
            f"in the order {', '.join(modalities)}; got {len(scans)} path(s)"
        )
    name = scans[0].name.removesuffix(".gz").removesuffix(".nii")
    case = Case(name, dict(zip(modalities, scans, strict=True)))
    return DataSet(scans[0].parent, posterior.card.layout, (case,), {}, {})


def not_predicted(out: Path, cases: Sequence[Case], trained: TrainedRun, config: PredictConfig) -> list[Case]:
    """The cases without a whole prediction of the same scans by the same posterior, with the same settings."""
    missing = []
    with progress("looking for predictions", len(cases)) as advance:
        for case in cases:
            path = out / f"{case.id}.json"
            if not path.exists() or read_json(path).get("settings") != _settings(trained, case, config):
                missing.append(case)
            advance("")
    return missing


def read_figures(out: Path, case: str, card: NetworkCard) -> dict[str, dict[str, Any]]:
    """What the `<case>.json` of a prediction says of each region: "volume_ml", "pairwise_dice" (None of one pass), …

    Raises:
        RunError: if it cannot be read, or does not say that.
    """
    path = out / f"{case}.json"
    regions = read_json(path).get("regions")
    for region in card.regions:
        figures = regions.get(region) if isinstance(regions, dict) else None
        if not isinstance(figures, dict) or not (
            isinstance(figures.get("volume_ml"), float) and isinstance(figures.get("pairwise_dice"), float | None)
        ):
            raise RunError(f"{path}: does not hold the figures of '{region}'; predict it again with --overwrite")
    return dict(regions or {})


def read_scan(case: Case, card: NetworkCard, data: DataSet) -> Scan:
    """A case as a network takes it; see `read_case`."""
    return read_case(case, card.modalities, data.labels, may_lack_modalities=card.may_lack_modalities)


def _fit_to_predict(case: Case, card: NetworkCard, data: DataSet) -> Case:
    """The case; without its label if that is unfit: of a prediction it is in the picture alone."""
    try:
        read_scan(case, card, data)
    except DataError as problem:
        if case.label is None:
            raise
        case = replace(case, label=None)
        read_scan(case, card, data)
        message(f"{case.id} is predicted without its label: {problem}")
    return case


def shown_image(scan: Scan, case: Case, card: NetworkCard) -> tuple[str, NDArray[np.float32]]:
    """The first modality that the case has, and its image [X, Y, Z]: what a picture shows."""
    number, name = next((number, name) for number, name in enumerate(card.modalities) if name in case.images)
    return name, scan.images[number]


def map_path(folder: Path, case: str, kind: str, region: str, card: NetworkCard) -> Path:
    """Where a map ("prob", "entropy", "mi") of a case lies; the region is in its name where there are several."""
    return folder / (f"{case}_{kind}.nii.gz" if len(card.regions) == 1 else f"{case}_{kind}_{region}.nii.gz")


def read_maps(folder: Path, case: str, kind: str, card: NetworkCard) -> NDArray[np.float32]:
    """The maps of a case, one per region [R, X, Y, Z]; arguments as for `map_path`.

    Raises:
        DataError: naming the file, if one is missing or damaged, or the maps have several shapes.
    """
    paths = [map_path(folder, case, kind, region, card) for region in card.regions]
    maps = [read_volume(path).data for path in paths]
    for path, volume in zip(paths, maps, strict=True):
        if volume.shape != maps[0].shape:
            raise DataError(f"{path}: has another shape than {paths[0].name}; predict the case again with --overwrite")
    return np.stack(maps)


def known_regions(card: NetworkCard, data: DataSet) -> tuple[frozenset[int], ...]:
    """Of each region of a network the label values in this data set; () if it has not all of them."""
    if not data.regions.keys() >= set(card.regions):
        return ()
    return tuple(data.regions[region] for region in card.regions)


def label_values(card: NetworkCard) -> tuple[int, ...]:
    """The value that each region has in a segmentation, no two alike.

    One region: 1. Several: the least label value, in the scans of training, that belongs to the region and to no
    region within it; so whole, core and enhancing of BraTS become its own values of oedema, necrosis and enhancing.
    Where there is no such value, or another region has it, the first that no scan of training has.
    """
    if len(card.regions) == 1:
        return (1,)
    sets = [set(values) for values in card.values]
    chosen: list[int] = []
    for values in sets:
        own = values.difference(*(other for other in sets if other < values), chosen)
        chosen.append(min(own) if own else max({*chosen, *set().union(*sets)}) + 1)
    return tuple(chosen)


def painting_order(card: NetworkCard) -> list[int]:
    """The numbers of the regions, those that contain others first."""
    return sorted(range(len(card.regions)), key=lambda number: -len(card.values[number]))


def label_volume(masks: NDArray[np.bool_], card: NetworkCard, values: Sequence[int]) -> NDArray[Any]:
    """Masks of the regions [R, X, Y, Z] → label values [X, Y, Z]; a region lies over those that contain it."""
    label = np.zeros(masks.shape[1:], np.uint8 if max(values) < 256 else np.uint16)
    for number in painting_order(card):
        label[masks[number]] = values[number]
    return label


class Prediction(NamedTuple):
    """Of one case: maps on the scan's own grid, [R, X, Y, Z], entropies in nats; `agreement` as in `Moments`."""

    scan: Scan
    probability: NDArray[np.float32]
    entropy: NDArray[np.float32]
    mutual_information: NDArray[np.float32]
    agreement: tuple[float, ...]


def predict_case(
    posterior: Posterior,
    case: Case,
    data: DataSet,
    config: PredictConfig,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Prediction:
    """Predict one case; nothing is written.

    Args:
        posterior: is moved to the device.
        case: to predict.
        data: that it belongs to.
        config: settings.
        device: to compute on.
        advance: called after each weight sample.

    Raises:
        DataError: if the scan is unfit.
        RunError: if the device's memory is too small, or the network's output is no number.
    """
    card = posterior.card
    scan = read_scan(case, card, data)
    preprocess = Preprocessing(card.spacing)
    example = preprocess(scan, known_regions(card, data))
    seeds = (
        [step_seed(config.seed, sample) for sample in range(_samples(posterior, config))] if config.samples else None
    )
    with within_memory(f"case {case.id}", PREDICTS_IN_LESS):
        posterior.to(device)
        image, brain = (volume.as_tensor().to(device) for volume in (example.image, example.brain))
        try:
            moments = posterior_predictive(
                posterior, image, seeds, config.overlap, config.precision, advance, brain[0].bool()
            )
        except FloatingPointError as problem:
            raise RunError(
                f"case {case.id}: {problem}, its weights being too large; train it again, or give --precision float32"
            ) from problem
        maps = torch.cat([moments.probability, moments.expected_entropy]).cpu()
    # Entropy is no mean: on the scan's grid it is that of the probability that is written there.
    probability, expected_entropy = torch.from_numpy(preprocess.invert(maps, example, scan)).chunk(2)
    written = Moments(probability.clamp(0, 1), expected_entropy, moments.agreement)
    return Prediction(
        scan,
        written.probability.numpy(),
        written.entropy.numpy(),
        written.mutual_information.numpy(),
        written.agreement,
    )


def predict_cases(
    trained: TrainedRun,
    cases: Sequence[Case],
    data: DataSet,
    config: PredictConfig,
    out: Path,
    device: torch.device,
) -> dict[str, list[Path]]:
    """Predict cases into a folder, replacing what is there; returns case → its pictures, one a region.

    Raises:
        DataError: if a scan is unfit; earlier cases are kept.
        RunError: if the device's memory is too small, or another process writes to the folder.
    """
    posterior = trained.posterior
    card = posterior.card
    # The label is drawn in the picture where its values mean the same structures as in training.
    known = known_regions(card, data)
    pictures: dict[str, list[Path]] = {}
    if not cases:
        return pictures
    warn_of_emulation(config.precision, device)
    with ExitStack() as held, progress("predicting", len(cases) * _passes(posterior, config)) as advance:
        for case in cases:
            scan, probability, entropy, mutual_information, agreement = predict_case(
                posterior, case, data, config, device, partial(advance, case.id)
            )
            masks = card.masks(probability)
            segmentation = label_volume(masks, card, label_values(card))
            if not pictures:  # not before: where the first scan is unfit, no folder is made
                held.enter_context(locked(out))
            marker = out / f"{case.id}.json"
            marker.unlink(missing_ok=True)  # until all maps of this prediction are there
            save_like(scan.reference, segmentation, out / f"{case.id}_seg.nii.gz")
            voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
            figures = {}
            _, shown = shown_image(scan, case, card)
            for number, region in enumerate(card.regions):
                maps = {"prob": probability[number], "entropy": entropy[number], "mi": mutual_information[number]}
                for kind, volume in maps.items():
                    save_like(scan.reference, volume, map_path(out, case.id, kind, region, card))
                truth = np.isin(scan.label, sorted(known[number])) if scan.label is not None and known else None
                suffix = "" if len(card.regions) == 1 else f"_{region}"
                picture = out / f"{case.id}{suffix}.png"
                save_case_figure(
                    picture, f"{case.id}: {region}", scan.affine, shown, truth, masks[number], *maps.values()
                )
                pictures.setdefault(case.id, []).append(picture)
                figures[region] = {
                    "pairwise_dice": agreement[number],
                    "volume_ml": float(masks[number].sum()) * voxel_ml,
                    "mean_entropy_of_brain": float(maps["entropy"][scan.brain].mean()),
                    "mean_mutual_information_of_brain": float(maps["mi"][scan.brain].mean()),
                }
            labels = dict(zip(card.regions, label_values(card), strict=True))
            write_json(marker, {"settings": _settings(trained, case, config), "labels": labels, "regions": figures})
    return pictures


def _passes(posterior: Posterior, config: PredictConfig) -> int:
    return _samples(posterior, config) or len(posterior.members)


def _samples(posterior: Posterior, config: PredictConfig) -> int:
    """Weight samples in all; 0 for the posterior means."""
    members = len(posterior.members)
    if config.samples and all(guide is None for _, guide in posterior.members):
        return members
    return math.ceil(config.samples / members) * members  # each member as often as the others


def _settings(trained: TrainedRun, case: Case, config: PredictConfig) -> dict[str, Any]:
    """All that a prediction depends on."""
    files = [case.images[name] for name in trained.posterior.card.modalities if name in case.images]
    files += [case.brain] if case.brain is not None else []
    return {
        "samples": _samples(trained.posterior, config),
        "overlap": config.overlap,
        "seed": config.seed,
        "precision": config.precision,
        "posterior": trained.digest,
        "regions": list(trained.posterior.card.regions),
        "scans": [file_digest(path) for path in dict.fromkeys(files)],  # a file may hold several modalities
    }


def save_like(reference: Path, volume: NDArray[np.uint8] | NDArray[np.float32], path: Path) -> None:
    """Write a volume with the header of the scan: its affine, its codes, its units."""
    header: Any = nibabel.load(reference).header.copy()
    header.set_data_dtype(volume.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    image = nibabel.Nifti1Image(volume, None, header)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
