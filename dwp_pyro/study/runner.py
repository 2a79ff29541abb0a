"""`experiment`: train and compare the methods of a study on the same cases with the same seeds."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import SviConfig
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.split import Split
from dwp_pyro.evaluation.evaluate import measure
from dwp_pyro.metrics import MEASURES
from dwp_pyro.plots.curves import save_learning_curves
from dwp_pyro.prediction.outputs import VERSION
from dwp_pyro.prediction.predict import load_run
from dwp_pyro.runtime.device import torch_device
from dwp_pyro.runtime.errors import ConfigError, DataError, FolderTaken, RunOutdated, UserError
from dwp_pyro.runtime.files import file_digest, locked, read_json, write_bytes, write_json
from dwp_pyro.runtime.progress import each, progress
from dwp_pyro.runtime.run_folder import check_pinned
from dwp_pyro.runtime.table import Table, markdown
from dwp_pyro.runtime.workers import Workers
from dwp_pyro.study.comparison import COMPARED, Row, compare, summarize_methods
from dwp_pyro.study.grid import Study, StudyRun
from dwp_pyro.training.finetune import finetune
from dwp_pyro.training.svi import svi
from dwp_pyro.training.training_data import find_split, find_unlabelled, resolve

__all__ = ["experiment", "read_rows", "run_if_unfinished"]

_logger = logging.getLogger(__name__)

_COLUMNS = ["method", "n", "seed", "case", "patient", *MEASURES, "seconds", "settings"]
# Tables of an older version may lack other metrics.
_REQUIRED_COLUMNS = {"method", "n", "seed", "case", *COMPARED, "iou", "seconds", "settings"}
_REPORT_INTERVAL = 10.0  # seconds


def experiment(study: Study, out: Path, *, workers: Workers | None = None, device: str = "auto") -> list[Table]:
    """Train and measure every unfinished run of a study; compare the methods.

    Writes `results.csv`, one row per run and case; `table.md`; `learning_curve.png`; and a folder per run in `runs/`.
    Another call resumes the study and trains runs added since. Runs are trained by `workers`, one process by default;
    on a CPU the results are reproducible to the bit for the same number of threads per worker.

    Returns:
        The tables of `table.md`: means of the methods, and differences, if any.

    Raises:
        UserError: if the study, its scans, its priors or the folder cannot be used (nothing is written then), or if a
            run fails (finished runs are kept).
        Interrupted: after SIGINT or SIGTERM; running trainings have saved their checkpoints.
    """
    torch_device(device)
    tasks = []
    digest = cache(file_digest)  # runs share scans
    for study_run in each(study.runs, "checking runs"):
        tasks.append(_task(study, study_run, out, device, digest))
    results = out / "results.csv"
    if out.exists() and not out.is_dir():
        raise FolderTaken(f"{out}: is a file, expected a folder")
    if out.exists() and not results.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FolderTaken(f"{out}: holds files, but no {results.name} of an experiment")
    with locked(out):
        rows = {task.study_run.key: list[Row]() for task in tasks}  # in the order of the study
        for row in read_rows(results) if results.exists() else ():
            rows.setdefault((row.method, row.n, row.seed), []).append(row)
        for task in tasks:
            known = {row.settings for row in rows[task.study_run.key]}
            if task.is_begun:
                known.add(read_json(task.record_path).get("settings", ""))
            if known - {task.settings}:
                raise FolderTaken(
                    f"{results}: {task} was run with other settings, scans or priors than {study.path} now names, "
                    "or by another version of dwp-pyro"
                )
        lines = {key: _lines(listed) for key, listed in rows.items()}
        _write_table(results, lines.values())
        left = [task for task in tasks if not rows[task.study_run.key]]
        reported = time.monotonic()

        def report() -> list[Table]:
            nonlocal reported
            reported = time.monotonic()
            listed = [row for task in tasks for row in rows[task.study_run.key]]
            tables = compare(listed, study.reference)
            write_bytes(out / "table.md", markdown(tables).encode())
            save_learning_curves(out / "learning_curve.png", summarize_methods(listed))
            return tables

        with progress("runs", len(tasks), len(tasks) - len(left)) as advance:

            def finished(task: _Task, measured: list[Row]) -> None:
                key = task.study_run.key
                rows[key], lines[key] = measured, _lines(measured)
                _write_table(results, lines.values())
                dice = sum(row.measures["dice"] for row in measured) / len(measured)
                _logger.info(f"{task}: Dice {dice:.3f}, {measured[0].seconds:.0f} s")
                advance("")
                if time.monotonic() - reported > _REPORT_INTERVAL:
                    report()

            try:
                (workers or Workers()).map(_run, left, finished)
            finally:
                if any(rows[task.study_run.key] for task in tasks):
                    tables = report()
    return tables


@dataclass(frozen=True)
class _Task:
    """Everything that a worker needs for a run; `settings` is a digest of everything that its result depends on."""

    study_run: StudyRun
    settings: str
    split: Split
    data: DataSet
    predict: PredictConfig
    run: Path
    device: str

    @property
    def record_path(self) -> Path:
        """File beside the run with its `settings` and its duration in seconds."""
        return self.run.with_name(f"{self.run.name}.json")

    @property
    def is_begun(self) -> bool:
        """Whether the run exists; an early failure may leave only its record."""
        return self.run.exists() and self.record_path.exists()

    def __str__(self) -> str:
        return str(self.study_run)


def _task(study: Study, study_run: StudyRun, out: Path, device: str, digest_of: Callable[[Path], str]) -> _Task:
    """Prepare a run; raise ConfigError if its scans, split, prior or source network are missing."""
    try:
        config = resolve(study_run.config.resolve_prior(), study_run.config.n)
        data, split = find_split(config, config.n)
        measured = split.test if study.evaluate == "test" else split.validation
        if not measured:
            raise DataError(f"the split has no {study.evaluate} cases to measure")
        cases = data.by_id
        scans: list[Path] = []
        for name in (*split.train, *split.validation, *measured):
            scans += cases[name].files(config.modality, label=True)
            missing = [modality for modality in config.modality if modality not in cases[name].images]
            if missing and not (config.modality_dropout and len(missing) < len(config.modality)):
                raise DataError(f"case {name}: has no {missing[0]} scan; add it, or exclude the case")
        more = find_unlabelled(config, split)
        scans += more.scans(config.modality) if more else []
        files = config.learned_from()
        for path in files:
            if not path.exists():
                raise ConfigError(f"{path}: no such file; make it with 'dwp-pyro fit-prior', or fix prior-dir")
    except UserError as problem:
        raise ConfigError(f"{study.path}: {study_run}: {problem}") from problem
    depends_on = {
        "command": "svi" if isinstance(config, SviConfig) else "finetune",
        "config": config.to_mapping(),
        "split": asdict(split),
        "learned_from": [digest_of(path) for path in files],
        "scans": [digest_of(path) for path in scans],
        "evaluate": study.evaluate,
        "samples": study.samples,
        "version": VERSION,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    predict = PredictConfig(samples=study.samples, seed=config.seed)
    run = out / "runs" / study_run.name
    data = dataclasses.replace(data, cases=tuple(cases[name] for name in measured))
    return _Task(StudyRun(study_run.method, config), digest, split, data, predict, run, device)


def _run(task: _Task) -> list[Row]:
    """Train or resume a run and measure it, in a worker."""
    config = task.study_run.config
    train = partial(svi, config) if isinstance(config, SviConfig) else partial(finetune, config)
    before = read_json(task.record_path).get("seconds", 0.0) if task.is_begun else 0.0
    start = time.monotonic()
    write_json(task.record_path, {"settings": task.settings, "seconds": before})
    try:
        run_if_unfinished(train, task.run, task.device)
    finally:  # the record of a killed run lacks the seconds since its last start
        seconds = before + time.monotonic() - start
        write_json(task.record_path, {"settings": task.settings, "seconds": seconds})
    # Training looks for the scans again; those that were added meanwhile move the roles.
    try:
        check_pinned(task.run / "split.json", asdict(task.split))
    except RunOutdated as problem:
        raise RunOutdated(
            f"{task.run}: scans were added or removed before it was trained; delete it and its .json, and start the "
            "study again"
        ) from problem
    device = torch_device(task.device)
    posterior = load_run(task.run).posterior
    measured = measure(posterior, task.data, task.predict, device)
    method, n, seed = task.study_run.key
    patients = task.data.patients
    return [
        Row(method, n, seed, case, metrics, seconds, task.settings, patients[case])
        for case, metrics in measured.items()
    ]


def read_rows(path: Path) -> list[Row]:
    """Read `results.csv`.

    Raises:
        FolderTaken: if the file is damaged or of another version.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns = set(reader.fieldnames or ())
            if not columns.issuperset(_REQUIRED_COLUMNS) or not columns.issubset(_COLUMNS):
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            return [
                Row(
                    line["method"],
                    int(line["n"]),
                    int(line["seed"]),
                    line["case"],
                    {name: float(line[name]) for name in MEASURES if line.get(name) or name in COMPARED},
                    float(line["seconds"]),
                    line["settings"],
                    line.get("patient") or line["case"],
                )
                for line in reader
            ]
        except (ValueError, TypeError, csv.Error) as problem:
            raise FolderTaken(f"{path}: is not a table of this version ({problem})") from problem


def _lines(rows: Iterable[Row]) -> str:
    """Return the lines of a run; formatted once, because the table is written after each run."""
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
    for row in rows:
        values = asdict(row)
        writer.writerow(values.pop("measures") | values | {"seconds": f"{row.seconds:.1f}"})
    return table.getvalue()


def _write_table(path: Path, runs: Iterable[str]) -> None:
    write_bytes(path, "".join([",".join(_COLUMNS), "\n", *runs]).encode())


def run_if_unfinished(train: Callable[[RunOptions], object], run: Path, device: str) -> None:
    """Train a run unless it is finished; resume it if it has started."""
    state = read_json(run / "run.json") if (run / "run.json").exists() else None
    if state is None or not state.get("finished"):
        train(RunOptions(run, device, resume=state is not None))
