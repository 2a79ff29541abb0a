"""The command line: parse, call one function of the pipeline, print. Torch is imported only when a command runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from dwp_pyro.config import (
    DATASETS,
    EXPORT_FORMATS,
    DataSettings,
    FinetuneConfig,
    FitPriorConfig,
    PredictConfig,
    RunOptions,
    Settings,
    SviConfig,
    data_root,
)
from dwp_pyro.errors import Interrupted, UserError
from dwp_pyro.progress import errors_are_json, fail, message, progress, set_style
from dwp_pyro.signals import raise_signals

__all__ = ["main"]

# Idle threads wait for some microseconds, then sleep (read when torch loads OpenMP). To wait on and on made a step up
# to six times slower where a core is shared, with another training or another virtual machine; to sleep at once
# made a step of a small network half as long again, for the time that it takes to wake.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if typing.TYPE_CHECKING:
    from dwp_pyro.metrics import Summary
    from dwp_pyro.report.comparison import Table

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SettingsT = TypeVar("_SettingsT", bound=Settings)


class _Group(click.Group):
    """Turns the errors of users into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with raise_signals():
                return super().invoke(ctx)
        except UserError as error:
            _fail(" ".join(str(error).split()), 2)
        except click.UsageError as error:
            if not errors_are_json():
                raise  # click shows how the command is used
            _fail(error.format_message(), error.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 2)
        except Interrupted as stop:
            command = self.commands[ctx.invoked_subcommand or ""]
            by_option = stop.resumable and any(parameter.name == "resume" for parameter in command.params)
            again = "go on by --resume" if by_option else "the same command goes on"
            _fail(f"{stop}; {again}", 128 + stop.signum)


def _fail(problem: str, code: int) -> typing.NoReturn:
    fail(problem)
    sys.exit(code)


def _cases(count: int) -> str:
    return f"{count} case{'s' if count != 1 else ''}"


class _List(click.ParamType):
    """Comma-separated values."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(self.kind(part.strip()) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of {self.kind.__name__} values, by commas", param, ctx)


def _settings_options(config: type[Settings]) -> Callable[[_Command], _Command]:
    """An option for each setting of a command; what is not given stays None."""

    def decorate(command: _Command) -> _Command:
        hints = typing.get_type_hints(config)
        for field in reversed(dataclasses.fields(config)):
            help_text = field.metadata["help"]
            default = field.default
            if "[default:" not in help_text and default is not None:
                shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
                help_text += f"  [default: {str(shown).lower() if isinstance(default, bool) else shown}]"
            flag = f"--{field.name.replace('_', '-')}"
            declaration = f"{flag}/--no-{flag[2:]}" if hints[field.name] is bool else flag
            command = click.option(
                declaration,
                field.name,
                type=_option_type(hints[field.name], field.metadata["choices"]),
                default=None,
                help=help_text,
            )(command)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            help="YAML file of settings; options given here win over it.",
        )(command)

    return decorate


def _option_type(hint: Any, choices: tuple[str, ...]) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return _List(typing.get_args(kind)[0])
    return click.Choice(choices) if choices else kind


def _resolve(config: type[_SettingsT], config_file: Path | None, given: dict[str, Any]) -> _SettingsT:
    values = {name: value for name, value in given.items() if value is not None}
    return config.from_mapping(values) if config_file is None else config.from_yaml(config_file, **values)


_out = click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<what it is>]")
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
_resume = click.option("--resume", is_flag=True, help="Go on where an unfinished run stopped.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what a former run left in the folder.")


_mlflow = click.option(
    "--mlflow",
    is_flag=True,
    help="Log settings, figures and files to MLflow too: $MLFLOW_TRACKING_URI, or runs/mlruns.",
)


def _run_options(command: _Command) -> _Command:
    return _out(_device(_resume(_overwrite(_mlflow(command)))))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dwp-pyro", prog_name="dwp-pyro")
@click.option(
    "--quiet", is_flag=True, envvar="DWP_PYRO_QUIET", show_envvar=True, help="Print results and errors, nothing else."
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    envvar="DWP_PYRO_LOG_FORMAT",
    show_envvar=True,
    help="Progress, messages and errors for people, or as a JSON object a line on standard error.",
)
def main(quiet: bool, log_format: Literal["text", "json"]) -> None:
    """Bayesian knowledge transfer for 3D medical segmentation.

    Convolution kernels learned on one disease become a prior for another: fit-prior learns the prior
    on a large source set, svi infers a network from 5 to 20 target scans under it, predict segments
    with a map of the uncertainty. Start with: dwp-pyro demo
    """
    set_style("quiet" if quiet else log_format, errors_as_json=log_format == "json")


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for everything.",
)
@_device
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything.")
def demo(out: Path, device: str, seed: int) -> None:
    """Everything on generated scans, in minutes.

    Writes scans in the layouts of real data sets, learns a prior on one disease, and transfers it to
    another. Called again on the same folder it goes on where it stopped.
    """
    from dwp_pyro.pipeline.demo import demo as run_demo

    result = run_demo(out, device, seed, say=message)
    click.echo()
    _print_table(result.table)
    click.echo("\nGenerated scans and short training: this shows that everything works, not which arm is better.")
    click.echo(f"\nKernels and prior samples:  {result.prior / 'kernels.png'}")
    for arm, run in result.runs.items():
        pictures = sorted((run / "predictions").glob("*.png"))
        click.echo(f"{arm} pictures:  {', '.join(map(str, pictures[:2]))}, ...")
    run = result.runs["DWP"]
    click.echo(f"Maps for a viewer (ITK-SNAP, ...):  {run / 'predictions'}/*_{{seg,prob,entropy,mi}}.nii.gz")
    click.echo(f"Figures of each test case:  {run / 'evaluation.csv'}")


@main.command()
@click.argument("dataset", type=click.Choice(["ms", "brats"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--cases", type=click.IntRange(min=1), default=24, show_default=True, help="Number of cases.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the anatomy.")
def phantom(dataset: str, out: Path, cases: int, seed: int) -> None:
    """Write generated scans into folder OUT, in a real layout.

    ms: heads with multiple sclerosis, as open_ms_data; brats: heads with a tumour, as BraTS 2018.
    """
    from dwp_pyro.data.phantom import write_phantoms

    with progress(f"{dataset} scans", cases) as advance:
        ids = write_phantoms(dataset, out, cases, seed, progress=lambda: advance(""))  # type: ignore[arg-type]
    click.echo(f"{_cases(len(ids))} in {out}: {ids[0]} to {ids[-1]}")


@main.command("check-data")
@click.option("--dataset", type=click.Choice(DATASETS), help="Layout of the scans.  [default: told from the folder]")
@click.option(
    "--root",
    help="Folder of the scans, or a CSV file that lists them.  "
    "[default: $DWP_PYRO_DATA/<dataset>, else ./data/<dataset>]",
)
@click.option(
    "--label-map",
    type=_List(str),
    help="What label values mean, as 1=oedema,2=necrosis,3=enhancing.  [default: as the layout says]",
)
@click.option("--modality", type=_List(str), help="Modalities each case must have.  [default: those any case has]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def check_data(
    dataset: str | None,
    root: str | None,
    label_map: tuple[str, ...] | None,
    modality: tuple[str, ...] | None,
    as_json: bool,
) -> None:
    """Show what a folder of scans holds, and what is wrong with it.

    Every file is read whole. Exit code 2 if any case has a problem; a case without a label has none, but training
    skips it.
    """
    if dataset is None and root is None:
        raise click.UsageError("give --dataset, --root, or both")
    from dwp_pyro.data.layouts import open_dataset
    from dwp_pyro.data.regions import parse_label_map
    from dwp_pyro.pipeline.check_data import check_data as check

    folder = data_root(dataset or "", root)
    data = open_dataset(folder, dataset, parse_label_map(label_map or ()))
    report = check(data, modality or ())
    problems = [problem for case in report["cases"] for problem in case["problems"]]
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_cases(report)
        for problem in problems:
            click.echo(f"problem: {problem}")
    if problems:
        spoiled = sum(1 for case in report["cases"] if case["problems"])
        _fail(f"{folder}: {spoiled} of {len(report['cases'])} cases have a problem, first: {problems[0]}", 2)


@main.command("fit-prior")
@_settings_options(FitPriorConfig)
@_run_options
def fit_prior(
    config_file: Path | None, out: Path | None, device: str, resume: bool, overwrite: bool, mlflow: bool, **given: Any
) -> None:
    """Learn a prior over convolution kernels.

    Trains source networks on bootstraps of the scans, collects the kernels of their snapshots, and fits
    a density to each block of the network, a variational autoencoder or another family; or fits to the kernels
    of a file (--kernels).
    Of the run folder prior.json, prior.safetensors and card.md are the prior: they hold no image and no name of a
    case, and can be shared. The rest of it names cases, and holds the source networks.
    """
    config = _resolve(FitPriorConfig, config_file, given)
    from dwp_pyro.pipeline.fit_prior import fit_prior as run
    from dwp_pyro.report.prior import prior_card

    # Without --dataset always prior-ms, where svi and finetune look for it, whatever lies in --root.
    source = (config.dataset or config.default_dataset) if config.kernels is None else Path(config.kernels).stem
    folder = out or Path(f"runs/prior-{source}")
    prior = run(config, RunOptions(folder, device, resume, overwrite, mlflow))
    about = prior.provenance
    sources = [
        [f"{bootstrap}", f"{snapshot}", *("-" if figure is None else f"{figure:.2f}" for figure in figures)]
        for (bootstrap, snapshot), *figures in zip(
            about["snapshot_ids"], about["dice"], about["start_correlation"], strict=True
        )
    ]
    if sources:
        click.echo("Source networks:")
        _print_rows(["bootstrap", "snapshot", "Dice", "correlation with start"], sources)
        correlations = [figure for figure in about["start_correlation"] if figure is not None]
        if correlations and min(correlations) > 0.5:
            click.echo(
                "Their kernels are still much like those they started from, so this prior knows more of "
                "initialisation than of the task: train with more --steps."
            )
        click.echo()
    _print_tables(prior_card(prior)[1:])
    _print_blocks(folder)
    click.echo(f"Prior: {folder}\nPicture: {folder / 'kernels.png'}")


@main.command()
@_settings_options(SviConfig)
@_run_options
def svi(
    config_file: Path | None, out: Path | None, device: str, resume: bool, overwrite: bool, mlflow: bool, **given: Any
) -> None:
    """Infer a network from n target scans, with a prior over its kernels.

    Mean-field variational inference. The prior comes from the folder that fit-prior made.
    """
    config = _resolve(SviConfig, config_file, given)
    from dwp_pyro.pipeline.svi import svi as run

    prior = config.prior if config.centre is None else f"{config.prior}-around-{config.centre}"
    folder = out or Path(f"runs/svi-{_dataset(config)}-{prior}-n{config.n}-seed{config.seed}")
    run(config, RunOptions(folder, device, resume, overwrite, mlflow))
    _print_trained(folder)


@main.command()
@_settings_options(FinetuneConfig)
@_run_options
def finetune(
    config_file: Path | None, out: Path | None, device: str, resume: bool, overwrite: bool, mlflow: bool, **given: Any
) -> None:
    """Train a deterministic network on n target scans: the arms to compare with.

    --init random is UNet-RI; --init source is UNet-PR; --init source --train ends is UNet-PRf; --init source
    --l2-sp 10000 is L2-SP.
    """
    config = _resolve(FinetuneConfig, config_file, given)
    from dwp_pyro.pipeline.finetune import finetune as run

    how = f"{config.init}-l2sp" if config.l2_sp else f"{config.init}-{config.train}"
    folder = out or Path(f"runs/finetune-{_dataset(config)}-{how}-n{config.n}-seed{config.seed}")
    run(config, RunOptions(folder, device, resume, overwrite, mlflow))
    _print_trained(folder)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("scans", type=click.Path(path_type=Path), nargs=-1, required=True)
@_settings_options(PredictConfig)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the predictions.  [default: RUN/predictions]")
@_device
@_resume
@_overwrite
def predict(
    run: Path,
    scans: tuple[Path, ...],
    config_file: Path | None,
    out: Path | None,
    device: str,
    resume: bool,
    overwrite: bool,
    **given: Any,
) -> None:
    """Segment SCANS with a trained RUN, with maps of the uncertainty.

    SCANS is a folder in any known layout, a CSV file that lists scans, or the files of one case, one a
    modality of the run in its order. Each case gets _seg, _prob, _entropy and _mi (mutual information) as
    NIfTI on its own grid, and a picture.
    """
    config = _resolve(PredictConfig, config_file, given)
    from dwp_pyro.pipeline.predict import predict as run_predict

    pictures = run_predict(run, scans, config, out=out, device=device, resume=resume, overwrite=overwrite)
    folder = out or run / "predictions"
    first = next(iter(pictures.values()), None)
    click.echo(f"{_cases(len(pictures))} in {folder}" + (f"; picture of the first: {first[0]}" if first else ""))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_settings_options(PredictConfig)
@click.option("--root", help="Folder of the scans, if it has moved since the run.")
@_device
def evaluate(run: Path, config_file: Path | None, root: str | None, device: str, **given: Any) -> None:
    """Measure a trained RUN on the test cases of its split.

    Overlap, surface distance, lesions, calibration and uncertainty of each case and their means, into
    RUN/evaluation.csv and RUN/evaluation.json; reliability and risk-coverage curves into the latter and into
    pictures beside it. Predicts the cases first, where that is not done.
    """
    config = _resolve(PredictConfig, config_file, given)
    from dwp_pyro.metrics import EMPTY_MASK_POLICY
    from dwp_pyro.pipeline.evaluate import evaluate as run_evaluate

    summary = run_evaluate(run, config, root=root, device=device)
    cases = next(iter(summary.values()))["dice"].cases
    _print_table({f"{run.name}: {region}": figures for region, figures in summary.items()})
    click.echo(f"Mean ± standard error over {cases} test cases. Empty masks: {EMPTY_MASK_POLICY}.")
    click.echo(f"Each case, and all measures: {run / 'evaluation.csv'}")
    click.echo(f"Curves: {run}/reliability*.png, {run}/risk_coverage*.png")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(EXPORT_FORMATS), required=True, help="What OUT is to be.")
def export(run: Path, out: Path, format_: str) -> None:
    """Write a trained RUN into a new folder OUT, for another tool.

    monai-bundle: configuration and weights with which MONAI predicts any folder of scans. nnunet: the label volumes
    of RUN/predictions (predict first) in nnU-Net's names, and the maps of the uncertainty in a folder beside them.
    """
    from dwp_pyro.pipeline.export import export_monai_bundle, export_nnunet

    if format_ == "nnunet":
        cases = export_nnunet(run, out)
        click.echo(f"{len(cases)} cases in {out}, their maps in {out / 'uncertainty'}")
    else:
        export_monai_bundle(run, out)
        click.echo(f"Bundle: {out}")
        run_it = "python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS"
        message(f"Next, with 'pip install fire': cd {out} && {run_it}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File of the page.  [default: RUN/report.html]")
@click.option("--root", help="Folder of the scans, if it has moved since the run.")
@click.option("--region", help="Region that the viewer shows.  [default: the first of RUN]")
def report(run: Path, out: Path | None, root: str | None, region: str | None) -> None:
    """Write a page about an evaluated RUN.

    Results with intervals, the best, median and worst test case in a viewer, calibration, training, data and
    settings. One HTML file, which needs no network: it holds images of those three cases.
    """
    from dwp_pyro.pipeline.report import report as run_report

    page = run_report(run, root=root, out=out, region=region)
    click.echo(f"Report: {page} ({page.stat().st_size / 1e6:.1f} MB), for a browser")


@main.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: runs/<name of STUDY>]")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Trainings side by side.")
@_device
def experiment(study: Path, out: Path | None, workers: int, device: str) -> None:
    """Train, measure and compare the arms of a STUDY.

    STUDY is a YAML file: arms, each a command and its settings; and cells, which arm with which n and
    seeds. Every case of every cell goes into results.csv; table.md and learning_curve.png compare the arms.
    Called again on the same folder it goes on where it stopped.
    """
    from dwp_pyro.pipeline.experiment import experiment as run
    from dwp_pyro.pipeline.study import Study

    folder = out or Path("runs") / study.stem
    tables = run(Study.read(study), folder, workers=workers, device=device, say=message)
    click.echo()
    _print_tables(tables)
    click.echo(f"\nTables: {folder / 'table.md'}\nFigure: {folder / 'learning_curve.png'}")
    click.echo(f"Each case: {folder / 'results.csv'}")


@main.command("score-prior")
@click.argument("prior", type=click.Path(path_type=Path))
@click.option("--kernels", type=click.Path(path_type=Path), required=True, help="A .safetensors bank or an .npy array.")
@click.option("--samples", type=click.IntRange(min=1), default=500, show_default=True, help="Samples K of the bound.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the bound's samples.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def score_prior(prior: Path, kernels: Path, samples: int, seed: int, as_json: bool) -> None:
    """Measure the log-density that a PRIOR gives to kernels, in nats a kernel.

    Beside it: N(0, 1) on each weight, and the full-covariance Gaussian of the kernels that the prior was
    fitted to.
    """
    from dwp_pyro.pipeline.score_prior import score_prior as score

    result = score(prior, kernels, samples=samples, seed=seed)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        nats = result["nats_per_kernel"]
        _print_rows(
            ["kernels", *(name.replace("_", " ") for name in nats)],
            [[str(result["kernels"]), *(f"{value:.2f}" for value in nats.values())]],
        )


@main.command("inspect-prior")
@click.argument("prior", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the pictures.  [default: runs/inspect-PRIOR]")
def inspect_prior(prior: Path, out: Path | None) -> None:
    """Show what a PRIOR is: its card, and pictures.

    Draws of it beside the kernels it was fitted to (where those lie with it); mean kernels along its most used latent
    dimensions (of VAEs); and what networks with kernels drawn from it make of a generated scan.
    """
    from dwp_pyro.pipeline.inspect_prior import inspect_prior as run

    found = run(prior, out or Path("runs") / f"inspect-{prior.resolve().name}")
    _print_tables(found.card)
    click.echo()
    for what, path in found.pictures.items():
        click.echo(f"{what}: {path}")


def _dataset(config: DataSettings) -> str:
    """What a run's folder says of its scans."""
    from dwp_pyro.pipeline.training_data import open_scans

    _, layout = config.scans
    return layout or open_scans(config).layout


def _print_trained(folder: Path) -> None:
    _print_blocks(folder)
    click.echo(f"Run: {folder}")
    message(f"Next: dwp-pyro evaluate {folder}   or: dwp-pyro predict {folder} SCANS")


def _print_blocks(folder: Path) -> None:
    from dwp_pyro.pipeline.blocks import BLOCKS_FILE
    from dwp_pyro.storage import read_yaml

    path = folder / BLOCKS_FILE
    if path.exists():
        parts = [f"{block} ({len(names)})" for block, names in read_yaml(path).items()]
        click.echo(f"Prior blocks and their convolutions: {', '.join(parts)}; by name: {path}")


def _print_table(table: dict[str, dict[str, Summary]]) -> None:
    from dwp_pyro.metrics import HEADLINE, MEASURES, show

    rows = [[arm, *(show(name, summary.get(name)) for name in HEADLINE)] for arm, summary in table.items()]
    _print_rows(["", *(MEASURES[name][0] for name in HEADLINE)], rows)


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
    _print_rows(["case", "modalities", "voxels", "spacing (mm)", "labels (ml)", "problems"], rows)
    for name, values in report["regions"].items():
        click.echo(f"region {name}: label {', '.join(map(str, values))}")
    unlabelled = sum(not case["label"] for case in report["cases"])
    if unlabelled:
        click.echo(f"{unlabelled} of {len(rows)} cases have no label: predict takes them, training skips them")


def _print_tables(tables: Sequence[Table]) -> None:
    for number, table in enumerate(tables):
        if number:
            click.echo()
        _print_rows(table.header, table.rows)
        click.echo(table.note)


def _print_rows(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
