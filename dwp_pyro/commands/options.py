"""Options of commands: one per setting, and the options of all runs."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dwp_pyro.config.base import MAX_SEED, Settings

__all__ = [
    "PATH",
    "device",
    "options_of_run",
    "overwrite",
    "resume",
    "seed_option",
    "settings_options",
    "workers_options",
]

PATH = click.Path(path_type=Path)


def settings_options(config: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds one option per setting, and --config; the command receives a `config`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(config)
        repeated = {field.metadata["repeats"] for field in dataclasses.fields(config)}

        @functools.wraps(command)
        def with_settings(config_file: Path | None, **options: Any) -> Any:
            given = {name: options.pop(name) for name in hints if name in options}
            return command(config=_load_settings(config, config_file, given), **options)

        decorated = with_settings
        for field in reversed(dataclasses.fields(config)):
            if field.metadata["repeats"]:
                continue
            help_text = field.metadata["help"]
            default = field.default
            if "[default:" not in help_text and default is not None:
                shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
                help_text += f"  [default: {str(shown).lower() if isinstance(default, bool) else shown}]"
            if field.name in repeated:
                help_text = help_text.replace("  [", " Repeat the option for several.  [", 1)
            flag = f"--{field.name.replace('_', '-')}"
            declaration = f"{flag}/--no-{flag[2:]}" if hints[field.name] is bool else flag
            decorated = click.option(
                declaration,
                field.name,
                type=_option_type(hints[field.name], field.metadata["choices"]),
                default=None,
                multiple=field.name in repeated,
                help=help_text,
            )(decorated)
        help_text = "YAML file of settings; options override it."
        return click.option("--config", "config_file", type=PATH, help=help_text)(decorated)

    return decorate


def _option_type(hint: Any, choices: tuple[str, ...]) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return str  # comma-separated; `Settings.from_mapping` splits it
    return click.Choice(choices) if choices else kind


def _load_settings(config: type[Settings], config_file: Path | None, given: dict[str, Any]) -> Settings:
    """Create settings from a YAML file, if there is one, and the options that were given."""
    values = {name: value for name, value in given.items() if value is not None}
    for field in dataclasses.fields(config):
        if first := field.metadata["repeats"]:
            several = values.pop(first, ())
            values |= {first: several[0]} if several else {}
            values |= {field.name: several[1:] or None} if several else {}
    return config.from_mapping(values) if config_file is None else config.from_yaml(config_file, **values)


out = click.option("--out", type=PATH, help="Folder of the run.  [default: runs/<command and main settings>]")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
resume = click.option("--resume", is_flag=True, help="Resume an unfinished run.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace a previous run in the folder.")
mlflow = click.option(
    "--mlflow",
    is_flag=True,
    help="Log settings, metrics and files to MLflow, too: $MLFLOW_TRACKING_URI, or runs/mlruns.",
)


def seed_option(help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds --seed."""
    return click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help=help_text)


def workers_options(default: int | None, description: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds --workers and --cluster; the command receives `workers`, None without either."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_workers(workers: int | None, cluster: str | None, **options: Any) -> Any:
            if workers is None and cluster is None:
                return command(workers=None, **options)
            from dwp_pyro.runtime.workers import Workers

            return command(workers=Workers(workers or 1, cluster), **options)

        shown = "none: in this process" if default is None else default
        with_workers = click.option(
            "--cluster",
            help=f"Dask scheduler whose workers {description} instead: tcp://HOST:PORT, or its file.  [default: none]",
        )(with_workers)
        return click.option(
            "--workers",
            type=click.IntRange(min=1),
            default=default,
            help=f"Number of processes that {description} at the same time.  [default: {shown}]",
        )(with_workers)

    return decorate


def options_of_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all runs."""
    workers = workers_options(None, "train members or bootstraps")
    return out(device(workers(resume(overwrite(mlflow(command))))))
