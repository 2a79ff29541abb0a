"""The public names: each loads, and the examples of their use in the documents run."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dwp_pyro
from dwp_pyro.cli import main
from dwp_pyro.priors.blocks import BLOCKS
from dwp_pyro.priors.kernel_prior import BlockInfo

ROOT = Path(__file__).parents[1]


def test_every_public_name_loads():
    for name in dwp_pyro.__all__:
        assert getattr(dwp_pyro, name).__name__ == name


def test_the_command_line_prints_the_version_of_the_package():
    assert CliRunner().invoke(main, ["--version"]).output == f"dwp-pyro, version {dwp_pyro.__version__}\n"


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/own-network.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Custom networks with kernels under a learned prior, trained by stock Pyro."""
    blocks = {name: dwp_pyro.KernelVAE([3, 3, 3], 2, (4,)) for name in BLOCKS}
    infos = {name: BlockInfo((), 0) for name in BLOCKS}
    dwp_pyro.KernelPrior("dwp", blocks, infos).save(tmp_path / "runs/prior-ms")
    monkeypatch.chdir(tmp_path)
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    names: dict[str, Any] = {}
    exec(code, names)
    assert math.isfinite(names["loss"])
    assert any((names["guide"].means()[site] != kernel).any() for site, kernel in names["kernels"].items())
