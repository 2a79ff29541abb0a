"""Split of the cases into training, validation and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dwp_pyro.runtime.errors import DataError, UserError
from dwp_pyro.runtime.files import read_json

__all__ = ["Split", "read_roles", "read_split", "seeded_split"]

_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Split:
    """Case ids by role; all cases of a patient have the same role.

    Training sets are nested: with the same seed, the smaller set is the first n patients of the larger one.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def seeded_split(patients: Mapping[str, str], n: int | None, validation: int, seed: int) -> Split:
    """Split a random permutation of the patients: a fifth for testing, then for validation, then n for training.

    Args:
        patients: Case id → patient.
        n: Number of training patients; None for all.
        validation: Number of validation patients.
        seed: Seed of the permutation.

    Raises:
        DataError: if there are too few patients.
    """
    order = _permutation(patients.values(), seed)
    test = round(_TEST_FRACTION * len(order))
    rest = order[test + validation :]
    if n is not None and n > len(order) - test:
        remedy = "n" if rest else "n and validation"
    else:
        remedy = "n or validation" if rest else "validation"
    reason = f"of {len(order)} patients {test} are for testing and {validation} for validation; lower {remedy}"
    roles = _first(rest, n, reason), order[test : test + validation], order[:test]
    return Split(*(_cases_of(role, patients) for role in roles))


def read_roles(path: Path, error: type[UserError] = DataError) -> dict[str, list[str]]:
    """Read a split file: JSON lists of case ids under "train", "test" and optionally "validation".

    Args:
        path: Split file.
        error: Class of the error to raise.

    Returns:
        Role → case ids, for the roles in the file.

    Raises:
        UserError: of class `error`, if the file cannot be read or a role is not a list of case ids.
    """
    content = read_json(path, error)
    unknown = sorted(content.keys() - {"train", "validation", "test", "unlabelled"})  # the last in the file of a run
    if unknown:
        raise error(f"{path}: '{unknown[0]}' is not a role; use 'train', 'validation' and 'test'")
    lists: dict[str, list[str]] = {role: content[role] for role in ("train", "validation", "test") if role in content}
    for role, names in lists.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise error(f"{path}: '{role}' should be a list of case ids")
    return lists


def read_split(path: Path, patients: Mapping[str, str], n: int | None, validation: int, seed: int) -> Split:
    """Read a split from a file; see `read_roles`.

    Without "validation" in the file, the last patients of a random permutation of its training patients validate.

    Args:
        path: Split file.
        patients: Case id → patient for all cases.
        n: Number of training patients, the first of the permutation; None for all.
        validation: Number of validation patients if the file names none.
        seed: Seed of the permutation.

    Raises:
        DataError: if the file cannot be read, names an unknown case or a case twice, gives a patient two roles, or has
            too few training patients.
    """
    roles_in_file = read_roles(path)
    lists = {role: roles_in_file.get(role, []) for role in ("train", "validation", "test")}
    named = [name for names in lists.values() for name in names]
    for name, count in Counter(named).items():
        if name not in patients:
            raise DataError(f"{path}: case '{name}' is not among the scans; fix the file or the folder of the scans")
        if count > 1:
            raise DataError(f"{path}: case '{name}' is named twice; give each case one role")
    roles: dict[str, str] = {}
    for role, names in lists.items():
        for name in names:
            if roles.setdefault(patients[name], role) != role:
                raise DataError(
                    f"{path}: patient '{patients[name]}' has cases in '{roles[patients[name]]}' and in '{role}'; "
                    "give all cases of a patient one role"
                )
    train_patients = {name: patients[name] for name in lists["train"]}
    order = _permutation(train_patients.values(), seed)
    if "validation" not in roles_in_file and validation:
        lists["validation"] = [*_cases_of(order[-validation:], train_patients)]
        order = order[:-validation]
    try:
        reason = f"{len(lists['validation'])} cases are for validation"
        train = _cases_of(_first(order, n, reason), train_patients)
        return Split(train, tuple(lists["validation"]), tuple(lists["test"]))
    except DataError as problem:
        raise DataError(f"{path}: {problem}") from problem


def _cases_of(chosen: Iterable[str], patients: Mapping[str, str]) -> tuple[str, ...]:
    order = {patient: position for position, patient in enumerate(chosen)}
    cases = (case for case, patient in patients.items() if patient in order)
    return tuple(sorted(cases, key=lambda case: (order[patients[case]], case)))


def _permutation(names: Iterable[str], seed: int) -> list[str]:
    ordered = sorted(set(names))
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def _first(patients: Sequence[str], n: int | None, reason: str) -> Sequence[str]:
    required = 1 if n is None else n
    if len(patients) < required:
        raise DataError(
            f"{required} training patient{'s' if required > 1 else ''} requested, {len(patients)} available: {reason}"
        )
    return patients[:n]
