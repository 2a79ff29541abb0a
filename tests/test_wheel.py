"""The wheel holds all that the package needs, outside a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import dwp_pyro

ROOT = Path(__file__).parents[1]
OFFLINE = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("pip") is None or find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77,
        reason="a wheel is built by pip and setuptools 77 or later",
    ),
]


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, as pip installs them; built from a copy, which leaves the checkout clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "dwp_pyro", source / "dwp_pyro", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, source)
    wheel = folder / f"dwp_pyro-{dwp_pyro.__version__}-py3-none-any.whl"
    assert list(folder.glob("*.whl")) == [wheel]
    pip("install", *OFFLINE, "--target", folder / "site", wheel)
    return folder / "site"


def output(site: Path, *command: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    line = list(map(str, command))
    return subprocess.run(line, cwd=site, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_command_answers(site):
    command = site / "bin" / "dwp-pyro"
    assert output(site, command, "--version") == f"dwp-pyro, version {dwp_pyro.__version__}\n"
    assert "fit-prior" in output(site, command, "--help")


def test_the_public_names_load(site):
    code = "import dwp_pyro; [getattr(dwp_pyro, name) for name in dwp_pyro.__all__]; print(dwp_pyro.svi.__module__)"
    assert output(site, sys.executable, "-c", code) == "dwp_pyro.training.svi\n"
    where = output(site, sys.executable, "-c", "import dwp_pyro; print(dwp_pyro.__file__)")
    assert where == f"{site / 'dwp_pyro' / '__init__.py'}\n"


def test_every_file_of_the_package_is_in_it(site):
    """The modules, `py.typed`, the pretrained prior, and the style, script and viewer of the page."""

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert files(site / "dwp_pyro") == files(ROOT / "dwp_pyro")
    assert {"py.typed", "evaluation/assets/report.css", "pretrained/ms/source.safetensors"} <= files(site / "dwp_pyro")
