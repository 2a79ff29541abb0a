"""Study files: methods, numbers of training cases, seeds, and settings of the comparison."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, SviConfig
from dwp_pyro.runtime.errors import ConfigError
from dwp_pyro.runtime.files import read_yaml

__all__ = ["Study", "StudyRun"]

_COMMANDS: dict[str, type[SviConfig] | type[FinetuneConfig]] = {"svi": SviConfig, "finetune": FinetuneConfig}
_ROLES = ("test", "validation")
_RUN_SETTINGS = ("n", "seed")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: the name of its method, and its settings, including n and seed."""

    method: str
    config: SviConfig | FinetuneConfig

    @property
    def key(self) -> tuple[str, int, int]:
        """Method, n and seed; unique in a study."""
        return self.method, self.config.n, self.config.seed

    @property
    def name(self) -> str:
        """Stem of the file names."""
        return f"{_as_path(self.method)}-n{self.config.n}-seed{self.config.seed}"

    def __str__(self) -> str:
        return f"{self.method}, n {self.config.n}, seed {self.config.seed}"


@dataclass(frozen=True)
class Study:
    """Grid of methods × n × seeds.

    Args:
        path: Study file.
        runs: Runs in the order of execution.
        evaluate: Role of the measured cases, "test" or "validation".
        samples: Number of weight samples of the posterior predictive.
        reference: Method that the others are compared with; None for the best at each n.
    """

    path: Path
    runs: tuple[StudyRun, ...]
    evaluate: str
    samples: int
    reference: str | None

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study file: YAML with `methods`, `runs`, and optional `settings`, `evaluate`, `samples`, `reference`.

        `settings` apply to all methods; settings that the command of a method lacks are ignored. Within an
        entry of `runs`, runs are ordered by seed, then n, then method, so that comparisons are complete early.

        Raises:
            ConfigError: if the file cannot be read or is invalid.
        """
        content = read_yaml(path, ConfigError)
        try:
            _check_names("study", content, ("settings", "methods", "runs", "evaluate", "samples", "reference"))
            methods = _methods(
                _mapping("methods", content.get("methods")), _mapping("settings", content.get("settings", {}))
            )
            runs = _runs(content.get("runs"), methods)
            evaluate, reference = content.get("evaluate", "test"), content.get("reference")
            reference = None if reference is None else str(reference)
            if evaluate not in _ROLES:
                raise ConfigError(f"evaluate: '{evaluate}' is not one of {', '.join(_ROLES)}")
            if reference is not None and reference not in methods:
                raise ConfigError(f"reference: '{reference}' is not one of the methods ({', '.join(methods)})")
            samples = PredictConfig.from_mapping({"samples": content.get("samples", 10)}).samples
        except ConfigError as problem:
            raise ConfigError(f"{path}: {problem}") from problem
        return cls(path, runs, evaluate, samples, reference)


def _methods(methods: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, SviConfig | FinetuneConfig]:
    """Return method → settings, with n and seed at their defaults."""
    known = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in _COMMANDS.items()}
    _check_names("settings", shared, set.union(*known.values()) - {*_RUN_SETTINGS})
    configs: dict[str, SviConfig | FinetuneConfig] = {}
    for method, values in methods.items():
        own = _mapping(f"method '{method}'", values)
        command = own.pop("command", None)
        if not isinstance(command, str) or command not in _COMMANDS:
            raise ConfigError(f"method '{method}': 'command' should be one of {', '.join(_COMMANDS)}, got {command!r}")
        for name in _RUN_SETTINGS:
            if name in own:
                raise ConfigError(f"method '{method}': '{name}' belongs in the runs")
        common = {name: value for name, value in shared.items() if name in known[command]}
        try:
            configs[method] = _COMMANDS[command].from_mapping(common | own)
        except ConfigError as problem:
            raise ConfigError(f"method '{method}': {problem}") from problem
    paths = [_as_path(method).casefold() for method in configs]
    for method, name in zip(configs, paths, strict=True):
        if paths.count(name) > 1:
            raise ConfigError(f"method '{method}': another method would have the same file names; rename one")
    return configs


def _runs(entries: Any, methods: Mapping[str, SviConfig | FinetuneConfig]) -> tuple[StudyRun, ...]:
    runs: dict[tuple[str, int, int], StudyRun] = {}
    for entry in _list("runs", entries):
        values = _mapping("runs", entry)
        _check_names("runs", values, ("methods", "n", "seeds"))
        names, sizes, seeds = (_list(f"runs: {key}", values.get(key)) for key in ("methods", "n", "seeds"))
        for seed, n, method in itertools.product(seeds, sizes, map(str, names)):
            if method not in methods:
                raise ConfigError(f"runs: '{method}' is not one of the methods ({', '.join(methods)})")
            try:
                study_run = StudyRun(method, dataclasses.replace(methods[method], n=n, seed=seed))
            except ConfigError as problem:
                raise ConfigError(f"runs: {problem}") from problem
            runs.setdefault(study_run.key, study_run)
    return tuple(runs.values())


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: should hold 'name: value' lines")
    if what == "methods":  # names are free
        return {str(name): item for name, item in value.items()}
    return {str(name).replace("-", "_"): item for name, item in value.items()}


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{what}: should be a list with at least one entry")
    return value


def _check_names(what: str, values: Collection[str], known: Collection[str]) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{what}: '{name}' is not one of {', '.join(sorted(known))}")


def _as_path(method: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", method)
