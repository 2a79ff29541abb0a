"""Segmentation and uncertainty of scans, on each scan's own grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.data.case import Case, Scan
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import detect_layouts, open_dataset
from dwp_pyro.data.layouts.file_names import modality_in_name, without_suffix
from dwp_pyro.data.preprocessing import Preprocessing
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import NetworkConfig, Posterior
from dwp_pyro.inference.predictive import binary_entropy, posterior_predictive
from dwp_pyro.inference.schedule import step_seed
from dwp_pyro.plots.cases import save_case_figure
from dwp_pyro.prediction.labels import label_values, read_scan, shown_image, to_label_map, warn_of_crossing_regions
from dwp_pyro.prediction.outputs import MAPS, VERSION, map_path, save_like
from dwp_pyro.runtime.device import catch_out_of_memory, torch_device, warn_if_emulated
from dwp_pyro.runtime.distributed import fail_together, gather, process_count, process_number
from dwp_pyro.runtime.errors import DataError, FolderTaken, PredictionExists, RunError, UserError, with_task_name
from dwp_pyro.runtime.files import file_digest, locked, read_json, write_json
from dwp_pyro.runtime.progress import each, progress
from dwp_pyro.runtime.signals import resumable
from dwp_pyro.runtime.workers import Workers

__all__ = ["Prediction", "TrainedRun", "load_run", "not_predicted", "predict", "predict_case", "predict_cases"]

_logger = logging.getLogger(__name__)

_LABEL_VALUES = 10  # a scan has more


def predict(
    run: Path,
    scans: Sequence[Path],
    config: PredictConfig,
    *,
    out: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    workers: Workers | None = None,
) -> dict[str, list[Path]]:
    """Predict scans with a trained run.

    For each case, writes on the grid and affine of its scan `<case>_seg.nii.gz` (see `label_values`), `_prob`,
    `_entropy` and `_mi` (nats); `<case>.png`; and, last, `<case>.json`. If there are several regions, all but `_seg`
    and the JSON file are written per region, e.g. `<case>_prob_core.nii.gz`.

    Args:
        run: Folder of a finished `svi` or `finetune` run.
        scans: One folder in a known layout, one CSV file that lists scans, or the files of one case, one per modality
            of the run, in its order.
        config: Settings of the prediction.
        out: Output folder; `run/predictions` by default.
        device: Device to run on.
        resume: Whether to skip cases that are predicted with the same settings.
        overwrite: Whether to replace existing predictions.
        workers: Workers that predict several cases at the same time.

    Returns:
        Case → its pictures, one per region.

    Raises:
        UserError: if the run or a scan cannot be used, or a prediction exists; existing files are kept.

    Examples:
        With the run of the example of `svi`:

        >>> from pathlib import Path
        >>> from dwp_pyro import PredictConfig, predict
        >>> pictures = predict(Path("runs/svi"), [Path("data/brats")], PredictConfig(samples=2), out=Path("maps"))
        >>> len(pictures), len(list(Path("maps").glob("*_mi.nii.gz")))
        (9, 9)
    """
    trained = load_run(run)
    data = _cases_to_predict(scans, trained.posterior)
    cases = list(data.cases)
    out = out or run / "predictions"
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other; choose one")
    if out.exists() and not out.is_dir():
        raise FolderTaken(f"{out}: is a file, expected a folder")
    done = [case for case in cases if (out / f"{case.id}.json").exists()]
    if done and not (resume or overwrite):
        raise PredictionExists(f"{out}: already holds a prediction of '{done[0].id}'")
    if resume:
        cases = not_predicted(out, cases, trained, config)
    cases = cases[process_number() :: process_count()]
    checked = []
    with fail_together():
        for case in each(cases, "checking scans"):  # all before writing anything
            checked.append(_fit_to_predict(case, trained.posterior.network_config, data))
    with resumable():
        with fail_together():
            pictures = predict_cases(trained, checked, data, config, out, device, workers)
        return gather(pictures)


class TrainedRun(NamedTuple):
    """Folder of a finished run, its posterior, and the digest of its file."""

    folder: Path
    posterior: Posterior
    digest: str


def load_run(run: Path) -> TrainedRun:
    """Load the posterior of a finished run.

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
            f"{run}: holds no finished 'svi' or 'finetune' run (posterior.safetensors); finish its training first"
        )
    return TrainedRun(run, Posterior.load(path), file_digest(path))


@lru_cache(1)
def _load_once(run: Path, digest: str) -> TrainedRun:
    """Return a run, for a worker that predicts several of its cases; raise RunError if the digest has changed."""
    trained = load_run(run)
    if trained.digest != digest:
        raise RunError(f"{run}: was trained again since the command started; start the command again")
    return trained


def _cases_to_predict(scans: Sequence[Path], posterior: Posterior) -> DataSet:
    """Find the cases in the paths given to `predict`.

    Raises:
        DataError: if a path is missing, or the files do not match the modalities.
    """
    network_config = posterior.network_config
    for path in scans:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give a folder of scans, a CSV file, or a case's files")
    if len(scans) == 1 and (scans[0].is_dir() or scans[0].suffix.casefold() == ".csv"):
        # If several layouts match, prefer that of the training scans.
        known = network_config.layout in detect_layouts(scans[0])
        return open_dataset(scans[0], network_config.layout if known else None, needs_labels=False)
    modalities = network_config.modalities
    if any(path.is_dir() for path in scans) or len(scans) != len(modalities):
        raise DataError(
            f"{scans[0]}: give one folder or CSV file, or {len(modalities)} file(s) of one case, "
            f"in the order {', '.join(modalities)}; got {len(scans)} path(s)"
        )
    name = without_suffix(scans[0])
    images = dict(zip(modalities, scans, strict=True))
    for modality, path in images.items():
        if modality_in_name(path) not in (None, modality):
            _logger.warning("%s: is read as the modality %s, which its name contradicts", path, modality)
    case = Case(name, images)
    return DataSet(scans[0].parent, network_config.layout, (case,), {}, {})


def not_predicted(out: Path, cases: Sequence[Case], trained: TrainedRun, config: PredictConfig) -> list[Case]:
    """Return the cases without a complete prediction from the same scans, posterior and settings."""
    missing = []
    for case in each(cases, "looking for predictions"):
        path, network_config = out / f"{case.id}.json", trained.posterior.network_config
        maps = [map_path(out, case.id, k, region, network_config) for region in network_config.regions for k in MAPS]
        complete = all(file.exists() for file in (path, out / f"{case.id}_seg.nii.gz", *maps))
        if not complete or read_json(path).get("settings") != _settings(trained, case, config):
            missing.append(case)
    return missing


def _fit_to_predict(case: Case, network_config: NetworkConfig, data: DataSet) -> Case:
    """Check a case; drop its label if that is invalid, since a prediction needs it only for the picture."""
    try:
        scan = read_scan(case, network_config, data)
    except DataError as problem:
        if case.label is None:
            raise
        case = replace(case, label=None)
        scan = read_scan(case, network_config, data)
        _logger.warning("predicting %s without its label: %s", case.id, problem)
    values = max(len(np.unique(channel)) for channel in scan.images)  # a missing modality is 0 everywhere
    if values <= _LABEL_VALUES:
        _logger.warning("%s: holds only %d different values; is it a label file?", scan.reference, values)
    return case


class Prediction(NamedTuple):
    """Masks and maps of one case on the grid of its scan, [R, X, Y, Z].

    Entropies are in nats; the fields are those of `PredictiveMoments`.
    """

    scan: Scan
    masks: NDArray[np.bool_]
    probability: NDArray[np.float32]
    entropy: NDArray[np.float32]
    mutual_information: NDArray[np.float32]
    pairwise_dice: tuple[float, ...]


def predict_case(
    posterior: Posterior,
    case: Case,
    data: DataSet,
    config: PredictConfig,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Prediction:
    """Predict one case in memory; move the posterior to `device`, and call `advance` after each weight sample.

    Raises:
        DataError: if the scan cannot be used.
        RunError: if the device runs out of memory, or the output of the network is NaN or infinite.
    """
    network_config = posterior.network_config
    scan = read_scan(case, network_config, data)
    preprocess = Preprocessing(network_config.spacing)
    decision = _decision(posterior, config)
    seeds = [step_seed(config.seed, number) for number in range(_passes(posterior, config))] if config.samples else None
    with catch_out_of_memory(f"case {case.id}"):
        example = preprocess(scan, ())
        posterior.to(device)
        image, brain_mask = (volume.as_tensor().to(device) for volume in (example.image, example.brain_mask))
        moments = posterior_predictive(
            posterior, image, seeds, config.overlap, config.precision, advance, brain_mask[0].bool(), decision
        )
        maps = torch.cat([moments.probability, moments.mutual_information]).cpu()
        probability, mutual_information = torch.from_numpy(preprocess.invert(maps, example, scan)).chunk(2)
        probability = probability.clamp(0, 1)
        entropy = binary_entropy(probability)  # of what is written; see `PredictiveMoments`
        return Prediction(
            scan,
            network_config.masks(probability.numpy(), decision, scan.spacing),
            probability.numpy(),
            entropy.numpy(),
            mutual_information.minimum(entropy).numpy(),
            moments.pairwise_dice,
        )


def predict_cases(
    trained: TrainedRun,
    cases: Sequence[Case],
    data: DataSet,
    config: PredictConfig,
    out: Path,
    device: str,
    workers: Workers | None = None,
) -> dict[str, list[Path]]:
    """Predict cases into a folder, replacing existing predictions; return case → its pictures, one per region.

    Raises:
        DataError: if a scan cannot be used; earlier cases are kept.
        RunError: if the device runs out of memory, or another process writes to the folder.
    """
    pictures: dict[str, list[Path]] = {}
    if not cases:
        return pictures
    warn_if_emulated(config.precision, torch_device(device))
    warn_of_crossing_regions(trained.posterior.network_config)
    passes = _passes(trained.posterior, config)
    with ExitStack() as held, progress("predicting", len(cases) * passes) as advance:

        def lock() -> None:  # late: an unreadable first scan must not leave an empty folder
            if not pictures and process_number() == 0:
                held.enter_context(locked(out))

        if workers is None:
            for case in cases:
                try:
                    prediction = predict_case(
                        trained.posterior, case, data, config, torch_device(device), partial(advance, case.id)
                    )
                except UserError as problem:
                    raise with_task_name(case, problem) from problem
                lock()
                pictures[case.id] = _save(prediction, trained, case, data, config, out)
        else:
            lock()

            def finished(case: Case, saved: list[Path]) -> None:
                pictures[case.id] = saved
                for _ in range(passes):
                    advance(case.id)

            shared = (trained.folder, trained.digest, replace(data, cases=()), config, out, device)
            workers.at_most(len(cases)).map(partial(_predict_in_worker, *shared), cases, finished)
    return {case.id: pictures[case.id] for case in cases}


def _predict_in_worker(
    run: Path, digest: str, data: DataSet, config: PredictConfig, out: Path, device: str, case: Case
) -> list[Path]:
    trained = _load_once(run, digest)
    prediction = predict_case(trained.posterior, case, data, config, torch_device(device))
    with locked(out, f".lock-{case.id}"):  # a worker of a cluster outlives its command
        return _save(prediction, trained, case, data, config, out)


def _save(
    prediction: Prediction, trained: TrainedRun, case: Case, data: DataSet, config: PredictConfig, out: Path
) -> list[Path]:
    """Write the files of a case; return its pictures."""
    network_config = trained.posterior.network_config
    scan, masks, probability, entropy, mutual_information, pairwise_dice = prediction
    values = label_values(network_config)
    marker = out / f"{case.id}.json"
    marker.unlink(missing_ok=True)  # marks a complete prediction
    save_like(scan.reference, to_label_map(masks, network_config), out / f"{case.id}_seg.nii.gz")
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / 1000
    pictures, metrics = [], {}
    _, shown = shown_image(scan, case, network_config)
    for number, region in enumerate(network_config.regions):
        maps = dict(zip(MAPS, (probability[number], entropy[number], mutual_information[number]), strict=True))
        for kind, volume in maps.items():
            save_like(scan.reference, volume, map_path(out, case.id, kind, region, network_config))
        known = data.regions.get(region)  # pictures show the label only if it names the region
        truth = scan.mask(known) if scan.label is not None and known else None
        suffix = "" if len(network_config.regions) == 1 else f"_{region}"
        pictures.append(out / f"{case.id}{suffix}.png")
        save_case_figure(pictures[-1], f"{case.id}: {region}", scan.affine, shown, truth, masks[number], *maps.values())
        metrics[region] = {
            "pairwise_dice": pairwise_dice[number],
            "volume_ml": float(masks[number].sum()) * voxel_ml,
            "mean_entropy_of_brain": float(maps["entropy"][scan.brain_mask].mean()),
            "mean_mutual_information_of_brain": float(maps["mi"][scan.brain_mask].mean()),
        }
    labels = dict(zip(network_config.regions, values, strict=True))
    write_json(marker, {"settings": _settings(trained, case, config), "labels": labels, "regions": metrics})
    return pictures


def _decision(posterior: Posterior, config: PredictConfig) -> Decision:
    if config.decision == "half":
        return Decision()
    return replace(posterior.decision, min_mass=1.0) if config.decision == "largest" else posterior.decision


def _passes(posterior: Posterior, config: PredictConfig) -> int:
    """Return the number of passes: the weight samples, rounded up to the same number per member and mirroring."""
    once = len(posterior.members) * len(_decision(posterior, config).flips)
    deterministic = all(guide is None for _, guide in posterior.members)
    return once if deterministic else once * max(1, math.ceil(config.samples / once))


def _settings(trained: TrainedRun, case: Case, config: PredictConfig) -> dict[str, Any]:
    """Return everything that a prediction depends on."""
    modalities = trained.posterior.network_config.modalities
    channels = {name: case.channels[name] for name in modalities if name in case.channels}
    return {
        "version": VERSION,
        "samples": _passes(trained.posterior, config) if config.samples else 0,
        "overlap": config.overlap,
        "seed": config.seed,
        "precision": config.precision,
        "decision": _decision(trained.posterior, config).to_mapping(),
        "posterior": trained.digest,
        "regions": list(trained.posterior.network_config.regions),
        "scans": [file_digest(path) for path in case.files(modalities, label=False)],
        **({"channels": channels} if channels else {}),
    }
