"""The demo as a whole command, on small scans with small networks that take a few steps."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dwp_pyro.cli import main
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.study import demo

pytestmark = pytest.mark.slow

BRIEF = {"steps": 3, "patch": 16}


def test_the_demo_goes_through_every_step_and_is_called_again(tmp_path, monkeypatch):
    def brief(config: type, given: dict[str, object]) -> object:
        return config.from_mapping(given | BRIEF | ({"density_steps": 2} if config is FitPriorConfig else {}))

    monkeypatch.setattr(demo, "_WIDTHS", (2, 3, 4, 5))
    monkeypatch.setattr(demo, "write_phantoms", partial(write_phantoms, shape=(20, 24, 20)))
    for config in (FitPriorConfig, SviConfig, FinetuneConfig):
        monkeypatch.setattr(demo, config.__name__, SimpleNamespace(from_mapping=partial(brief, config)))
    out = tmp_path / "demo"
    first, again = (CliRunner().invoke(main, ["demo", "--out", str(out)]) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert all(method in first.stdout for method in ("DWP", "UNet-RI", "UNet-PR"))
    assert list(out.rglob("*_mi.nii.gz"))
    tables = [result.stdout.partition("\n\n")[2] for result in (first, again)]
    assert tables[0] == tables[1]
    assert CliRunner().invoke(main, ["demo", "--out", str(out), "--seed", "1"]).exit_code == 2
