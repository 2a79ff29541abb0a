"""Commands on a trained run: predict, evaluate, report, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dwp_pyro.commands.console import count_cases, logger, print_table
from dwp_pyro.commands.options import PATH, device, overwrite, resume, settings_options, workers_options
from dwp_pyro.config.prediction import PredictConfig

__all__ = ["evaluate", "export", "predict", "report"]


@click.command()
@click.argument("run", type=PATH)
@click.argument("scans", type=PATH, nargs=-1, required=True)
@settings_options(PredictConfig)
@click.option("--out", type=PATH, help="Folder of the predictions.  [default: RUN/predictions]")
@device
@workers_options(None, "predict cases")
@resume
@overwrite
def predict(
    run: Path, scans: tuple[Path, ...], config: PredictConfig, out: Path | None, device: str, **options: Any
) -> None:
    """Segment SCANS with a trained RUN and map the uncertainty.

    SCANS is a folder in any known layout, a CSV file that lists scans, or the files of one case, one per
    modality in the order of the run. The output per case is _seg, _prob, _entropy and _mi (mutual
    information) as NIfTI on the grid of the scan, and a plot.
    """
    from dwp_pyro.prediction.predict import predict as run_predict
    from dwp_pyro.runtime.distributed import join_processes

    with join_processes(device) as (own_device, _):
        plots = run_predict(run, scans, config, out=out, device=own_device, **options)
        folder = out or run / "predictions"
        first = next(iter(plots.values()), None)
        click.echo(f"{count_cases(len(plots))} in {folder}" + (f"; plot of the first: {first[0]}" if first else ""))


@click.command()
@click.argument("run", type=PATH)
@settings_options(PredictConfig)
@click.option("--root", help="Folder of the scans, if it was moved after the run.")
@device
@workers_options(None, "predict and measure cases")
def evaluate(run: Path, config: PredictConfig, **options: Any) -> None:
    """Evaluate a trained RUN on the test cases of its split.

    Writes overlap, surface distance, lesion, calibration and uncertainty metrics of each case and their means
    to RUN/evaluation.csv and RUN/evaluation.json, and reliability and risk-coverage curves to the latter and
    to plots beside it. Predicts missing cases first.
    """
    from dwp_pyro.evaluation.evaluate import evaluate as run_evaluate
    from dwp_pyro.metrics import EMPTY_MASK_POLICY

    summary = run_evaluate(run, config, **options)
    cases = next(iter(summary.values()))["dice"].cases
    print_table({f"{run.name}: {region}": metrics for region, metrics in summary.items()})
    click.echo(f"Mean ± standard error over {cases} test patients. Empty masks: {EMPTY_MASK_POLICY}.")
    click.echo(f"All metrics per case: {run / 'evaluation.csv'}")
    click.echo(f"Curves: {run}/reliability*.png, {run}/risk_coverage*.png")


@click.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="Output file.  [default: RUN/report.html]")
@click.option("--root", help="Folder of the scans, if it was moved after the run.")
@click.option("--region", help="Region to show in the viewer.  [default: the first of RUN]")
def report(run: Path, **options: Any) -> None:
    """Write an HTML report of an evaluated RUN.

    The report has results with intervals, the best, median and worst test case in a viewer, calibration,
    training, data and settings. It is one file that works offline and contains images of these three cases.
    """
    from dwp_pyro.evaluation.report import report as run_report

    page = run_report(run, **options)
    click.echo(f"Report: {page} ({page.stat().st_size / 1e6:.1f} MB)")


@click.command()
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--format", "format_", type=click.Choice(["monai-bundle", "nnunet"]), required=True, help="Format of OUT."
)
def export(run: Path, out: Path, format_: str) -> None:
    """Export a trained RUN to a new folder OUT for another tool.

    monai-bundle: configuration and weights for prediction with MONAI. nnunet: label maps of RUN/predictions (run
    predict first) with the file names of nnU-Net, and uncertainty maps in a subfolder.
    """
    from dwp_pyro.export.monai_bundle import export_monai_bundle
    from dwp_pyro.export.nnunet import export_nnunet

    if format_ == "nnunet":
        cases = export_nnunet(run, out)
        click.echo(f"{len(cases)} cases in {out}, uncertainty maps in {out / 'uncertainty'}")
    else:
        export_monai_bundle(run, out)
        click.echo(f"Bundle: {out}")
        bundle_command = "python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS"
        logger.info(f"Next, with 'pip install fire': cd {out} && {bundle_command}")
