"""Commands on scans: phantom and check-data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from dwp_pyro.commands.console import count_cases, exit_with_error, print_rows
from dwp_pyro.commands.options import PATH, seed_option
from dwp_pyro.config.data import DATASETS, data_root

__all__ = ["check_data", "phantom"]


@click.command()
@click.argument("dataset", type=click.Choice(["ms", "brats"]))
@click.argument("out", type=PATH)
@click.option("--cases", type=click.IntRange(min=1), default=24, show_default=True, help="Number of cases.")
@seed_option("Seed of the anatomy.")
def phantom(dataset: str, out: Path, cases: int, seed: int) -> None:
    """Write generated scans to folder OUT in the layout of a real data set.

    ms: brains with multiple sclerosis, as open_ms_data; brats: brains with a tumor, as BraTS 2018. Both without skulls.
    """
    from dwp_pyro.data.phantom import write_phantoms

    ids = write_phantoms(dataset, out, cases, seed)  # type: ignore[arg-type]
    click.echo(f"{count_cases(len(ids))} in {out}: {ids[0]} to {ids[-1]}")


@click.command("check-data")
@click.option(
    "--dataset", type=click.Choice(DATASETS), help="Layout of the scans.  [default: detected from the folder]"
)
@click.option(
    "--root",
    help="Folder of the scans, or CSV file that lists them.  "
    "[default: $DWP_PYRO_DATA/<dataset>, else ./data/<dataset>]",
)
@click.option(
    "--label-map", help="Names of the label values, as 1=oedema,2=necrosis,3=enhancing.  [default: those of the layout]"
)
@click.option(
    "--modality", help="Modalities that each case must have, as flair,t1.  [default: all modalities of any case]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def check_data(
    dataset: str | None, root: str | None, label_map: str | None, modality: str | None, as_json: bool
) -> None:
    """Show the content and the problems of a folder of scans.

    Reads every file completely. The exit code is 2 if any case has a problem. A missing label is not a problem, but
    training skips the case.
    """
    if dataset is None and root is None:
        raise click.UsageError("give --dataset, --root, or both")
    from dwp_pyro.data.check import check_data as check
    from dwp_pyro.data.layouts import open_dataset
    from dwp_pyro.data.modalities import modality_name
    from dwp_pyro.data.regions import parse_label_map

    folder = data_root(dataset or "", root)
    data = open_dataset(folder, dataset, parse_label_map(label_map.split(",") if label_map is not None else ()))
    report = check(data, [modality_name(name) for name in modality.split(",")] if modality is not None else ())
    problems = [problem for case in report["cases"] for problem in case["problems"]]
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_cases(report)
        for problem in problems:
            click.echo(f"problem: {problem}")
    if problems:
        bad_cases = sum(1 for case in report["cases"] if case["problems"])
        exit_with_error(
            f"{folder}: {bad_cases} of {len(report['cases'])} cases have a problem, first: {problems[0]}", 2
        )


def _print_cases(report: dict[str, Any]) -> None:
    rows = []
    for case in report["cases"]:
        ml = math.prod(case["spacing"] or ()) / 1000
        labels = ", ".join(f"{name} {count * ml:.1f}" for name, count in case["labels"].items())
        if not case["label"]:
            labels = "none: training skips it"
        rows.append(
            [
                case["id"],
                " ".join(case["modalities"]),
                "×".join(map(str, case["shape"])) if case["shape"] else "-",
                "×".join(f"{side:g}" for side in case["spacing"]) if case["spacing"] else "-",
                labels or "-",
                f"{len(case['problems'])}" if case["problems"] else "none",
            ]
        )
    click.echo(f"Layout {report['layout']}, {len(rows)} cases")
    print_rows(["case", "modalities", "voxels", "spacing (mm)", "labels (ml)", "problems"], rows)
    for name, values in report["regions"].items():
        click.echo(f"region {name}: label {', '.join(map(str, values))}")
    first, *others = (case["modalities"] for case in report["cases"])
    shared = [name for name in first if all(name in modalities for modalities in others)]
    unlabeled = sum(not case["label"] for case in report["cases"])
    if len(shared) > 1 and unlabeled < len(rows):
        chosen = f"--modality {','.join(shared)} --modality-dropout 0.1"
        click.echo(f"every case has {', '.join(shared)}: train on several with {chosen}")
    if unlabeled:
        click.echo(f"{unlabeled} of {len(rows)} cases have no label: training skips them, predict uses them")
