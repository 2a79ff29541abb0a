"""Commands that run several methods: demo and experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dwp_pyro.commands.console import print_table, print_tables
from dwp_pyro.commands.options import PATH, device, seed_option, workers_options

__all__ = ["demo", "experiment"]


@click.command()
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True, help="Output folder.")
@device
@seed_option("Seed of scans and training.")
def demo(out: Path, device: str, seed: int) -> None:
    """Run the whole pipeline on generated scans, in minutes.

    Writes scans in the layouts of real data sets, learns a prior on one disease, and transfers it to
    another. Run it again with the same folder to resume it.
    """
    from dwp_pyro.study.demo import demo as run_demo

    table, runs = run_demo(out, device, seed)
    click.echo()
    print_table(table)
    click.echo("\nGenerated scans and short training: this checks the installation and does not compare the methods.")
    click.echo(f"\nKernels and prior samples: {out / 'runs/prior-ms/kernels.png'}")
    for method, run in runs.items():
        plots = sorted((run / "predictions").glob("*.png"))
        click.echo(f"Plots of {method}: {', '.join(map(str, plots[:2]))}, ...")
    click.echo(f"Maps for a viewer (ITK-SNAP, ...): {runs['DWP'] / 'predictions'}/*_{{seg,prob,entropy,mi}}.nii.gz")
    click.echo(f"Metrics per test case: {runs['DWP'] / 'evaluation.csv'}")


@click.command()
@click.argument("study", type=PATH)
@click.option("--out", type=PATH, help="Folder of the results.  [default: runs/<name of STUDY>]")
@workers_options(1, "train runs")
@device
def experiment(study: Path, out: Path | None, **options: Any) -> None:
    """Train, evaluate and compare the methods of a STUDY.

    STUDY is a YAML file with methods, each a command and its settings, and runs, each a list of methods with
    values of n and seeds. results.csv has the metrics of every test case of every run; table.md and
    learning_curve.png compare the methods. Run it again with the same folder to resume it.
    """
    from dwp_pyro.study.grid import Study
    from dwp_pyro.study.runner import experiment as run

    folder = out or Path("runs") / study.stem
    tables = run(Study.read(study), folder, **options)
    click.echo()
    print_tables(tables)
    click.echo(f"\nTables: {folder / 'table.md'}\nPlot: {folder / 'learning_curve.png'}")
    click.echo(f"Metrics per case: {folder / 'results.csv'}")
