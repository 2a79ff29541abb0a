"""Base class of settings: validation on construction, and conversion from and to YAML."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dwp_pyro.runtime.errors import ConfigError

if TYPE_CHECKING:  # imports torch
    from dwp_pyro.runtime.workers import Workers

__all__ = ["MAX_SEED", "PRECISION_HELP", "RunOptions", "Settings", "setting"]

MAX_SEED = 2**32 - 1

_MAX_NUMBER = 10**15  # integers up to this limit are exact as float

PRECISION_HELP = "Precision of the network; bf16 is faster on GPUs and on CPUs that support it."


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    repeats: str | None = None,
) -> Any:
    """Return a dataclass field with its limits and the help of its command-line option.

    The option of the setting `repeats` may be given several times; this setting holds all values but the first.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"help": help, "repeats": repeats, **limits})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one command; lists become tuples.

    Raises:
        ConfigError: if a value has the wrong type or is outside of its choices or its range.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            name = item.name.replace("_", "-")
            if not _matches(value, hints[item.name]):
                raise ConfigError(f"{name}: expected {_describe(hints[item.name])}, got {reprlib.repr(value)}")
            choices, minimum, maximum = (item.metadata.get(key) for key in ("choices", "minimum", "maximum"))
            for part in value if isinstance(value, tuple) else (value,):
                if part is None:
                    continue
                if isinstance(part, int | float) and not abs(part) <= _MAX_NUMBER:
                    raise ConfigError(f"{name}: must be a number of at most {_MAX_NUMBER:g}, got {reprlib.repr(part)}")
                if choices and part not in choices:
                    raise ConfigError(f"{name}: '{part}' is not one of {', '.join(choices)}")
                if minimum is not None and not part >= minimum:
                    raise ConfigError(f"{name}: must be at least {minimum:g}, got {part:g}")
                if maximum is not None and not part <= maximum:
                    raise ConfigError(f"{name}: must be at most {maximum:.12g}, got {part:.12g}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Create settings from plain values, as in YAML: names may have dashes.

        Raises:
            ConfigError: if a name is unknown or a value is invalid.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise ConfigError(f"'{key}' is not a setting of this command (settings: {', '.join(sorted(known))})")
            if name in arguments:
                raise ConfigError(f"'{key}' is given twice, with a dash and with an underscore")
            lists = [hint for hint in (hints[name], *typing.get_args(hints[name])) if typing.get_origin(hint) is tuple]
            if isinstance(value, str) and lists:  # as the option is written
                parts = value.split(",") if known[name].metadata["repeats"] is None else [value]
                with suppress(ValueError):  # the constructor says what it expects
                    value = tuple(typing.get_args(lists[0])[0](part.strip()) for part in parts)
            if hints[name] is float and _matches(value, int) and abs(value) <= _MAX_NUMBER:
                value = float(value)
            if isinstance(value, str) and float in (hints[name], *typing.get_args(hints[name])):
                with suppress(ValueError):
                    value = float(value)  # YAML reads 1e-3 as text
            arguments[name] = value
        return cls(**arguments)

    @classmethod
    def from_yaml(cls, path: Path, **changes: Any) -> Self:
        """Read settings from a YAML file and override some of them.

        Args:
            path: YAML file.
            **changes: Settings that override those of the file.

        Raises:
            ConfigError: if the file cannot be read or a setting is invalid; the message names the file, unless the
                setting is one of `changes`.
        """
        from dwp_pyro.runtime.files import read_yaml  # imported late, to keep --help fast

        values = read_yaml(path, ConfigError)
        kept = {name: value for name, value in values.items() if name.replace("-", "_") not in changes}
        try:
            return cls.from_mapping({**kept, **changes})
        except ConfigError as problem:
            if str(problem).partition(":")[0].replace("-", "_") in changes:
                raise
            raise ConfigError(f"{path}: {problem}") from problem

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for YAML and JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a value has a type; a whole number is a number, a bool is neither, a tuple must not be empty."""
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_matches(value, kind) for kind in kinds)
    if kinds:
        return isinstance(value, tuple) and len(value) > 0 and all(_matches(item, kinds[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, float | int if hint is float else hint)


def _describe(hint: Any) -> str:
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(kind) for kind in kinds if kind is not types.NoneType)
    if kinds:
        return f"a list, each {_describe(kinds[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


@dataclass(frozen=True)
class RunOptions:
    """Output, device and logging of a run; none of them changes its result.

    Args:
        out: Folder of the run.
        device: "auto", "cpu", "cuda" or "cuda:1".
        resume: Whether to resume an unfinished run.
        overwrite: Whether to replace a previous run of the same command.
        mlflow: Whether to log settings, metrics and files to MLflow, too.
        workers: Workers that train members or bootstraps at the same time; None trains them one after another.

    Examples:
        >>> from pathlib import Path
        >>> from dwp_pyro import RunOptions
        >>> RunOptions(Path("runs/mine"), device="cpu").resume
        False
    """

    out: Path
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    mlflow: bool = False
    workers: Workers | None = None
