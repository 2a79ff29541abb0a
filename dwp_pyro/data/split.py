"""Which cases train, validate and test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dwp_pyro.errors import DataError, UserError
from dwp_pyro.storage import read_json

__all__ = ["Split", "read_roles", "read_split", "seeded_split"]

_TEST_PART = 0.2


@dataclass(frozen=True)
class Split:
    """Case ids by role; no case has two, and no patient.

    Training sets are nested: with the same seed, the n first patients of a larger training set are the smaller one.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def to_mapping(self) -> dict[str, list[str]]:
        """Plain lists, as a split file holds them."""
        return {role: list(ids) for role, ids in asdict(self).items()}


def seeded_split(patients: Mapping[str, str], n: int | None, validation: int, seed: int) -> Split:
    """A fifth of the seed's permutation of patients for testing, then the validation patients, then the first n others.

    Args:
        patients: Case id → patient; all cases of a patient have one role.
        n: Training patients; None takes all.
        validation: Validation patients.
        seed: Seed of the permutation.

    Raises:
        DataError: if there are too few patients.
    """
    order = _permutation(patients.values(), seed)
    tested = round(_TEST_PART * len(order))
    rest = order[tested + validation :]
    if n is not None and n > len(order) - tested:
        remedy = "--n" if rest else "--n and --validation"
    else:
        remedy = "--n or --validation" if rest else "--validation"
    taken = f"of {len(order)} patients {tested} test and {validation} validate; lower {remedy}"
    roles = _first(rest, n, taken), order[tested : tested + validation], order[:tested]
    return Split(*(_cases_of(role, patients) for role in roles))


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


def read_split(path: Path, patients: Mapping[str, str], n: int | None, validation: int, seed: int) -> Split:
    """The split that a file says; see `read_roles`.

    Without "validation", the last of the seed's permutation of the training patients validate.

    Args:
        path: Split file.
        patients: Case id → patient, of all cases.
        n: Training patients, the first of the seed's permutation; None takes all.
        validation: Validation patients, where the file names none.
        seed: Seed of the permutation.

    Raises:
        DataError: naming the file, if it cannot be read, names a case that is not there or one twice, gives a patient
            two roles, or has too few training patients.
    """
    given = read_roles(path)
    lists = {role: given.get(role, []) for role in ("train", "validation", "test")}
    named = [name for names in lists.values() for name in names]
    for name in named:
        if name not in patients:
            raise DataError(f"{path}: case '{name}' is not among the scans; correct the file or the --root")
        if named.count(name) > 1:
            raise DataError(f"{path}: case '{name}' is named twice; a case has one role")
    roles: dict[str, str] = {}
    for role, names in lists.items():
        for name in names:
            if roles.setdefault(patients[name], role) != role:
                raise DataError(
                    f"{path}: patient '{patients[name]}' has cases in '{roles[patients[name]]}' and in '{role}'; "
                    "give all of a patient's cases one role"
                )
    of_train = {name: patients[name] for name in lists["train"]}
    order = _permutation(of_train.values(), seed)
    if "validation" not in given and validation:
        lists["validation"] = [*_cases_of(order[-validation:], of_train)]
        order = order[:-validation]
    try:
        taken = f"beside {len(lists['validation'])} that validate (--validation, or 'validation' in the file)"
        train = _cases_of(_first(order, n, taken), of_train)
        return Split(train, tuple(lists["validation"]), tuple(lists["test"]))
    except DataError as problem:
        raise DataError(f"{path}: {problem}") from problem


def _cases_of(chosen: Iterable[str], patients: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(case for patient in chosen for case in sorted(patients) if patients[case] == patient)


def _permutation(names: Iterable[str], seed: int) -> list[str]:
    ordered = sorted(set(names))
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def _first(patients: Sequence[str], n: int | None, taken: str) -> Sequence[str]:
    wanted = 1 if n is None else n
    if len(patients) < wanted:
        raise DataError(
            f"{wanted} training patient{'s' if wanted > 1 else ''} asked for, {len(patients)} left: {taken}"
        )
    return patients[:n]
