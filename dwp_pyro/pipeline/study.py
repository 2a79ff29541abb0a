"""A study: which arms are trained on how many cases with which seeds, and how they are compared."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwp_pyro.config import FinetuneConfig, PredictConfig, SviConfig
from dwp_pyro.errors import ConfigError
from dwp_pyro.storage import read_yaml

__all__ = ["Cell", "Study"]

_COMMANDS: dict[str, type[SviConfig] | type[FinetuneConfig]] = {"svi": SviConfig, "finetune": FinetuneConfig}
_ROLES = ("test", "validation")
_OF_CELLS = ("n", "seed")


@dataclass(frozen=True)
class Cell:
    """One training of a study.

    Args:
        arm: its name.
        config: settings of `svi` or `finetune`, n and seed among them.
    """

    arm: str
    config: SviConfig | FinetuneConfig

    @property
    def key(self) -> tuple[str, int, int]:
        """Arm, n and seed: no two cells of a study agree in all of them."""
        return self.arm, self.config.n, self.config.seed

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{_as_path(self.arm)}-n{self.config.n}-seed{self.config.seed}"

    def __str__(self) -> str:
        return f"{self.arm}, n {self.config.n}, seed {self.config.seed}"


@dataclass(frozen=True)
class Study:
    """A grid of arms × n × seeds.

    Args:
        path: the file that says so.
        cells: in order of rank.
        evaluate: the role of the cases that are measured, "test" or "validation".
        samples: weight samples of the posterior predictive.
        reference: the arm that the others are compared with; None for the best at each n.
    """

    path: Path
    cells: tuple[Cell, ...]
    evaluate: str
    samples: int
    reference: str | None

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study file: YAML with `arms`, `cells`, and perhaps `settings`, `evaluate`, `samples`, `reference`.

        `settings` hold for all arms; those that only the other command has are left out of an arm's. In an entry
        of `cells` all arms come before the next n, and every n before the next seed: a comparison is complete early.

        Raises:
            ConfigError: naming the file, if it cannot be read or does not fit.
        """
        content = read_yaml(path, ConfigError)
        try:
            _check_names("study", content, ("settings", "arms", "cells", "evaluate", "samples", "reference"))
            arms = _arms(_mapping("arms", content.get("arms")), _mapping("settings", content.get("settings", {})))
            cells = _cells(content.get("cells"), arms)
            evaluate, reference = content.get("evaluate", "test"), content.get("reference")
            if evaluate not in _ROLES:
                raise ConfigError(f"evaluate: '{evaluate}' is not one of {', '.join(_ROLES)}")
            if reference is not None and reference not in list(arms):
                raise ConfigError(f"reference: '{reference}' is not one of the arms ({', '.join(arms)})")
            samples = PredictConfig.from_mapping({"samples": content.get("samples", 10)}).samples
        except ConfigError as problem:
            raise ConfigError(f"{path}: {problem}") from problem
        return cls(path, cells, evaluate, samples, reference)


def _arms(arms: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, SviConfig | FinetuneConfig]:
    """The settings of each arm; n and seed at their defaults."""
    known = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in _COMMANDS.items()}
    _check_names("settings", shared, set.union(*known.values()) - {*_OF_CELLS})
    configs: dict[str, SviConfig | FinetuneConfig] = {}
    for arm, values in arms.items():
        own = _mapping(f"arm '{arm}'", values)
        command = own.pop("command", None)
        if not isinstance(command, str) or command not in _COMMANDS:
            raise ConfigError(f"arm '{arm}': 'command' should be one of {', '.join(_COMMANDS)}, got {command!r}")
        for name in _OF_CELLS:
            if name in own:
                raise ConfigError(f"arm '{arm}': '{name}' belongs into the cells")
        common = {name: value for name, value in shared.items() if name in known[command]}
        try:
            configs[arm] = _COMMANDS[command].from_mapping(common | own)
        except ConfigError as problem:
            raise ConfigError(f"arm '{arm}': {problem}") from problem
    paths = [_as_path(arm).casefold() for arm in configs]
    for arm, name in zip(configs, paths, strict=True):
        if paths.count(name) > 1:
            raise ConfigError(f"arm '{arm}': another arm would have the same file names; rename one")
    return configs


def _cells(entries: Any, arms: Mapping[str, SviConfig | FinetuneConfig]) -> tuple[Cell, ...]:
    cells: dict[tuple[str, int, int], Cell] = {}
    for entry in _list("cells", entries):
        values = _mapping("cells", entry)
        _check_names("cells", values, ("arms", "n", "seeds"))
        names, sizes, seeds = (_list(f"cells: {key}", values.get(key)) for key in ("arms", "n", "seeds"))
        for seed, n, arm in itertools.product(seeds, sizes, map(str, names)):
            if arm not in arms:
                raise ConfigError(f"cells: '{arm}' is not one of the arms ({', '.join(arms)})")
            try:
                cell = Cell(arm, dataclasses.replace(arms[arm], n=n, seed=seed))
            except ConfigError as problem:
                raise ConfigError(f"cells: {problem}") from problem
            cells.setdefault(cell.key, cell)
    return tuple(cells.values())


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: should hold 'name: value' lines")
    if what == "arms":  # names of the user's own
        return {str(name): item for name, item in value.items()}
    return {str(name).replace("-", "_"): item for name, item in value.items()}


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{what}: should be a list, with one entry at least")
    return value


def _check_names(what: str, values: Collection[str], known: Collection[str]) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{what}: '{name}' is not one of {', '.join(sorted(known))}")


def _as_path(arm: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", arm)
