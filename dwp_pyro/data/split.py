"""Which cases train, validate and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dwp_pyro.errors import DataError, UserError
from dwp_pyro.storage import read_json

__all__ = ["Split", "read_roles", "read_split", "seeded_split"]

_TEST_PART = 0.2


@dataclass(frozen=True)
class Split:
    """Case ids by role; no case has two.

    Training sets are nested: with the same seed, the n first of a larger training set are the smaller one.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def to_mapping(self) -> dict[str, list[str]]:
        """Plain lists, as a split file holds them."""
        return {role: list(ids) for role, ids in asdict(self).items()}


def seeded_split(ids: Sequence[str], n: int | None, validation: int, seed: int) -> Split:
    """A fifth of the seed's permutation for testing, then the validation cases, then the first n of the rest.

    Args:
        ids: of all cases.
        n: training cases; None takes all.
        validation: validation cases.
        seed: of the permutation.

    Raises:
        DataError: if there are too few cases.
    """
    order = _permutation(ids, seed)
    tested = round(_TEST_PART * len(order))
    rest = order[tested + validation :]
    taken = f"of {len(order)} cases {tested} test and {validation} validate (--validation)"
    return Split(_first(rest, n, taken), tuple(order[tested : tested + validation]), tuple(order[:tested]))


def read_roles(path: Path, error: type[UserError] = DataError) -> dict[str, list[str]]:
    """A split file: JSON lists of case ids under "train", "test" and, if wanted, "validation"; those that are there.

    Raises:
        UserError: of the class `error`, naming the file, if it cannot be read, or these are no lists of case ids.
    """
    content = read_json(path, error)
    lists: dict[str, list[str]] = {role: content[role] for role in ("train", "validation", "test") if role in content}
    for role, names in lists.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise error(f"{path}: '{role}' should be a list of case ids; mend it")
    return lists


def read_split(path: Path, ids: Sequence[str], n: int | None, validation: int, seed: int) -> Split:
    """The split that a file says; see `read_roles`.

    Without "validation", the last of the seed's permutation of the training cases validate.

    Args:
        path: of the file.
        ids: of all cases.
        n: training cases, the first of the seed's permutation; None takes all.
        validation: validation cases, where the file names none.
        seed: of the permutation.

    Raises:
        DataError: naming the file, if it cannot be read, names a case that is not there or one twice, or has too
            few training cases.
    """
    given = read_roles(path)
    lists = {role: given.get(role, []) for role in ("train", "validation", "test")}
    named = [name for names in lists.values() for name in names]
    for name in named:
        if name not in ids:
            raise DataError(f"{path}: case '{name}' is not among the scans; correct the file or the --root")
        if named.count(name) > 1:
            raise DataError(f"{path}: case '{name}' is named twice; a case has one role")
    order = _permutation(lists["train"], seed)
    if "validation" not in given and validation:
        lists["validation"] = order[-validation:]
        order = order[:-validation]
    try:
        taken = f"beside {len(lists['validation'])} that validate (--validation, or 'validation' in the file)"
        return Split(_first(order, n, taken), tuple(lists["validation"]), tuple(lists["test"]))
    except DataError as problem:
        raise DataError(f"{path}: {problem}") from problem


def _permutation(ids: Sequence[str], seed: int) -> list[str]:
    ordered = sorted(ids)
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def _first(ids: Sequence[str], n: int | None, taken: str) -> tuple[str, ...]:
    wanted = 1 if n is None else n
    if len(ids) < wanted:
        raise DataError(f"{wanted} training cases asked for, {len(ids)} left: {taken}")
    return tuple(ids[:n])
