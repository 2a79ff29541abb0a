"""The examples in the public names' docstrings run, one after the other, in a folder with generated scans."""

from __future__ import annotations

import doctest

import pytest

import dwp_pyro
from dwp_pyro.data.phantom import write_phantoms

#: In the order in which each needs the one before.
NAMES = ("bayesianize", "DeepWeightPrior", "MeanFieldNormal", "fit_prior", "svi", "predict")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples")
    for dataset, cases in (("ms", 4), ("brats", 9)):
        write_phantoms(dataset, path / "data" / dataset, cases, shape=(20, 24, 20))
    return path


def test_the_examples_run_and_print_what_they_say(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in NAMES:
        found = doctest.DocTestFinder(recurse=False).find(getattr(dwp_pyro, name), name)
        assert sum(len(test.examples) for test in found) >= 3, name
        runner = doctest.DocTestRunner()
        said: list[str] = []
        for test in found:
            runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)
