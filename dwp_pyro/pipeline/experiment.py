"""`experiment`: a study's arms side by side, on the same cases with the same seeds."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dwp_pyro.config import PredictConfig, SviConfig
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.errors import ConfigError, DataError, RunError, UserError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.metrics import MEASURES
from dwp_pyro.pipeline.evaluate import measure
from dwp_pyro.pipeline.finetune import finetune
from dwp_pyro.pipeline.predict import load_run
from dwp_pyro.pipeline.study import Cell, Study
from dwp_pyro.pipeline.svi import svi
from dwp_pyro.pipeline.train_once import train_once
from dwp_pyro.pipeline.training_data import find_split, with_defaults
from dwp_pyro.pipeline.workers import in_processes
from dwp_pyro.progress import progress
from dwp_pyro.report.comparison import COMPARED, Row, Table, compare, markdown, summarise_arms
from dwp_pyro.report.figures import save_learning_curves
from dwp_pyro.storage import file_digest, locked, read_json, write_bytes, write_json

__all__ = ["experiment"]

_COLUMNS = ["arm", "n", "seed", "case", *MEASURES, "seconds", "settings"]
_NEEDED = {"arm", "n", "seed", "case", *COMPARED, "iou", "seconds", "settings"}  # a table may be older than a measure
_REPORT_INTERVAL = 10.0  # seconds


def experiment(
    study: Study,
    out: Path,
    *,
    workers: int = 1,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> list[Table]:
    """Train and measure every cell of a study that is not done yet; compare the arms.

    Writes `results.csv`, a row a cell and case; `table.md` and `learning_curve.png`; and the run of each cell under
    `cells/`. Called again it goes on where it stopped, and a study that has grown goes on with what is new. On a CPU
    the figures are the same to the bit for the same number of threads a worker.

    Args:
        study: what to train.
        out: folder of the results.
        workers: cells side by side, each in a process of its own, with its share of the cores.
        device: to compute on.
        say: called with a line after each cell.

    Returns:
        The tables of `table.md`: the arms' means, and the differences if there are any.

    Raises:
        UserError: if the study, its scans, its priors or the folder are unfit, nothing being written then; or of a
            cell, which the message names, those that are finished being kept.
        Interrupted: after SIGINT or SIGTERM; trainings under way have saved their checkpoints.
    """
    torch_device(device)
    tasks = []
    with progress("checking cells", len(study.cells)) as advance:
        for cell in study.cells:
            tasks.append(_task(study, cell, out, device))
            advance("")
    results = out / "results.csv"
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out names a folder")
    if out.exists() and not results.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise RunError(f"{out}: holds files, but no {results.name} of an experiment; choose another --out")
    with locked(out):
        rows = {task.cell.key: list[Row]() for task in tasks}  # in the study's order
        for row in _read_rows(results) if results.exists() else ():
            rows.setdefault((row.arm, row.n, row.seed), []).append(row)
        for task in tasks:
            known = {row.settings for row in rows[task.cell.key]}
            if task.is_begun:
                known.add(read_json(task.record).get("settings", ""))
            if known - {task.settings}:
                raise RunError(
                    f"{results}: {task} was run with other settings, scans or priors than {study.path} now names; "
                    "give another --out"
                )
        _write_rows(results, rows.values())
        left = [task for task in tasks if not rows[task.cell.key]]
        reported = time.monotonic()

        def report() -> list[Table]:
            nonlocal reported
            reported = time.monotonic()
            listed = [row for task in tasks for row in rows[task.cell.key]]
            tables = compare(listed, study.reference)
            write_bytes(out / "table.md", markdown(tables).encode())
            save_learning_curves(out / "learning_curve.png", summarise_arms(listed))
            return tables

        with progress("cells", len(tasks), len(tasks) - len(left)) as advance:

            def finished(task: _Task, measured: list[Row]) -> None:
                rows[task.cell.key] = measured
                _write_rows(results, rows.values())
                dice = sum(row.measures["dice"] for row in measured) / len(measured)
                say(f"{task}: Dice {dice:.3f}, {measured[0].seconds:.0f} s")
                advance("")
                if time.monotonic() - reported > _REPORT_INTERVAL:
                    report()

            try:
                in_processes(_run, left, workers, finished)
            finally:
                if any(rows[task.cell.key] for task in tasks):
                    tables = report()
    return tables


@dataclass(frozen=True)
class _Task:
    """A cell, and all that a worker needs to run it.

    Args:
        cell: to train, its settings resolved.
        settings: digest of all that its result depends on.
        data: the cases to measure.
        predict: settings of the predictions.
        run: folder of the training.
        device: to compute on.
    """

    cell: Cell
    settings: str
    data: DataSet
    predict: PredictConfig
    run: Path
    device: str

    @property
    def record(self) -> Path:
        """Beside the run: its `settings`, and the seconds that it took."""
        return self.run.with_name(f"{self.run.name}.json")

    @property
    def is_begun(self) -> bool:
        """Whether there is a run, and so a record of it; a failure ahead of the run may leave a record alone."""
        return self.run.exists() and self.record.exists()

    def __str__(self) -> str:
        return str(self.cell)


def _task(study: Study, cell: Cell, out: Path, device: str) -> _Task:
    """Raises ConfigError if the cell's scans, split, prior or source network are not there."""
    try:
        config = with_defaults(cell.config, cell.config.n)
        data, split = find_split(config, config.n)
        measured = split.test if study.evaluate == "test" else split.validation
        if not measured:
            raise DataError(f"the split has no {study.evaluate} cases, there is nothing to measure")
        cases = data.by_id
        for name in (*split.train, *split.validation, *measured):
            missing = [modality for modality in config.modality if modality not in cases[name].images]
            if missing and not (config.modality_dropout and len(missing) < len(config.modality)):
                raise DataError(f"case {name}: has no {missing[0]} scan; add it, or leave the case out")
        files = config.learned_from()
        for path in files:
            if not path.exists():
                raise ConfigError(f"{path}: no such file; make it with 'dwp-pyro fit-prior', or mend prior-from")
    except UserError as problem:
        raise ConfigError(f"{study.path}: {cell}: {problem}") from problem
    depends_on = {
        "command": "svi" if isinstance(config, SviConfig) else "finetune",
        "config": config.to_mapping(),
        "split": split.to_mapping(),
        "learned_from": [file_digest(path) for path in files],
        "evaluate": study.evaluate,
        "samples": study.samples,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
    predict = PredictConfig(samples=study.samples, seed=config.seed)
    run = out / "cells" / cell.name
    data = dataclasses.replace(data, cases=tuple(cases[name] for name in measured))
    return _Task(Cell(cell.arm, config), digest, data, predict, run, device)


def _run(task: _Task) -> list[Row]:
    """Train a cell, or go on with it, and measure it; in a worker."""
    config = task.cell.config
    train = partial(svi, config) if isinstance(config, SviConfig) else partial(finetune, config)
    before = read_json(task.record).get("seconds", 0.0) if task.is_begun else 0.0
    start = time.monotonic()
    write_json(task.record, {"settings": task.settings, "seconds": before})
    try:
        train_once(train, task.run, task.device)
    finally:  # of a killed run the seconds until then are lost
        seconds = before + time.monotonic() - start
        write_json(task.record, {"settings": task.settings, "seconds": seconds})
    device = torch_device(task.device)
    posterior = load_run(task.run).posterior
    measured = measure(posterior, task.data, task.predict, device)
    arm, n, seed = task.cell.key
    return [Row(arm, n, seed, case, figures, seconds, task.settings) for case, figures in measured.items()]


def _read_rows(path: Path) -> list[Row]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns = set(reader.fieldnames or ())
            if not columns.issuperset(_NEEDED) or not columns.issubset(_COLUMNS):
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            return [
                Row(
                    line["arm"],
                    int(line["n"]),
                    int(line["seed"]),
                    line["case"],
                    {name: float(line[name]) for name in MEASURES if line.get(name) or name in COMPARED},
                    float(line["seconds"]),
                    line["settings"],
                )
                for line in reader
            ]
        except (ValueError, TypeError, csv.Error) as problem:
            raise RunError(f"{path}: is not a table of this version ({problem}); give another --out") from problem


def _write_rows(path: Path, cells: Iterable[Iterable[Row]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in (row for cell in cells for row in cell):
        values = asdict(row)
        writer.writerow(values.pop("measures") | values | {"seconds": f"{row.seconds:.1f}"})
    write_bytes(path, table.getvalue().encode())
