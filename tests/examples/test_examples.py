"""The examples run, with budgets that suit a test."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest

import dwp_pyro
from dwp_pyro.priors.blocks import BLOCKS
from dwp_pyro.priors.kernel_prior import BlockInfo

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Replaces the cell of the notebook with the tag "parameters".
SMALL = {
    "MS_CASES": 3,
    "TUMOR_CASES": 9,
    "SHAPE": (20, 24, 20),
    "WIDTHS": (2, 3, 4, 5),
    "PATCH": 16,
    "BOOTSTRAPS": 1,
    "SOURCE_STEPS": 2,
    "DENSITY_STEPS": 2,
    "SVI_STEPS": 2,
    "SAMPLES": 2,
}


@pytest.fixture(scope="module")
def own_network() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_network", EXAMPLES / "own_network.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_network_fits_a_prior_and_trains_under_it(own_network, capsys):
    metrics = own_network.main(["--cases", "1", "--prior-steps", "2", "--steps", "2", "--samples", "2"])
    assert metrics.keys() == {"Dice", "NLL", "entropy", "mutual information"}
    assert all(math.isfinite(value) for value in metrics.values())
    assert "block up3: 192 kernels" in capsys.readouterr().out


def test_own_network_trains_under_a_prior_from_a_folder(own_network, capsys, tmp_path):
    blocks = {name: dwp_pyro.KernelVAE([3, 3, 3], 2, (4,)) for name in BLOCKS}
    dwp_pyro.KernelPrior("dwp", blocks, {name: BlockInfo((), 0) for name in BLOCKS}).save(tmp_path)
    metrics = own_network.main(["--prior-dir", str(tmp_path), "--cases", "1", "--steps", "1", "--samples", "2"])
    assert math.isfinite(metrics["NLL"])
    assert "block" not in capsys.readouterr().out


@pytest.mark.slow
def test_own_network_learns(own_network):
    assert own_network.main([])["Dice"] > 0.4


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    notebook = json.loads((EXAMPLES / "from_five_scans_to_a_report.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    (parameters,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    given: dict[str, object] = {}
    exec("".join(parameters["source"]), given)
    assert given.keys() - {"__builtins__", "Path"} == SMALL.keys() | {"FOLDER"}

    names: dict[str, object] = {"FOLDER": Path("five-scans"), **SMALL}
    for cell in cells:
        if cell is not parameters:
            exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
            plt.close("all")
    assert (tmp_path / "five-scans" / "runs" / "svi" / "report.html").stat().st_size > 100_000
    assert len(list((tmp_path / "five-scans" / "maps").glob("*_mi.nii.gz"))) == 1
