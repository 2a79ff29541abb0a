"""The examples in the docstrings of the public names, run in a folder with generated scans."""

from __future__ import annotations

import doctest
import logging

import pytest

import dwp_pyro
from dwp_pyro.data.phantom import write_phantoms

#: Run first, in this order: each needs the one before.
CHAIN = ("fit_prior", "svi", "predict", "finetune", "evaluate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples")
    for dataset, cases in (("ms", 4), ("brats", 9)):
        write_phantoms(dataset, path / "data" / dataset, cases, shape=(20, 24, 20))
    return path


def test_every_public_name_has_an_example_that_runs(folder, monkeypatch, caplog):
    monkeypatch.chdir(folder)
    caplog.set_level(logging.WARNING, "dwp_pyro")  # messages go to standard output
    for name in (*CHAIN, *sorted(set(dwp_pyro.__all__) - {*CHAIN, "__version__"})):
        found = doctest.DocTestFinder(recurse=False).find(getattr(dwp_pyro, name), name)
        assert sum(len(test.examples) for test in found) >= 2, name
        runner = doctest.DocTestRunner()
        output: list[str] = []
        for test in found:
            runner.run(test, out=output.append)
        assert not runner.failures, "".join(output)
