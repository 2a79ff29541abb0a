"""Model card written by fit-prior and printed by inspect-prior, and the plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.world import error_line

PRIOR = "runs/prior-ms"


def plots(folder: Path) -> set[str]:
    """Return the names of the plots; none is blank."""
    for path in folder.iterdir():
        assert imread(path)[..., :3].std() > 0.02, path
    return {path.name for path in folder.iterdir()}


def test_the_prior_has_a_card(in_world):
    card = (in_world / PRIOR / "card.md").read_text()
    assert "| license | not stated |" in card and "| modalities | flair |" in card
    assert "| widths of the network | 2, 3, 4, 5 |" in card
    assert "| source networks | 2, 4 snapshots |" in card
    provenance = json.loads((in_world / PRIOR / "prior.json").read_text())["provenance"]
    assert provenance["dataset"] == "openms" and provenance["network"]["spacing"] == 3.0
    assert "brain" in provenance["normalization"]


@pytest.mark.slow
def test_options_state_source_and_license(command, in_world, tmp_path):
    """A prior of a bank inherits the facts of its networks, and states the options given."""
    stated = ("--license", "CC-BY 4.0", "--source", "generated heads", "--family", "gaussian")
    bank = f"{PRIOR}/kernels.safetensors"
    result = command("fit-prior", "--kernels", bank, *stated, "--modality", "t2", "--out", tmp_path / "p")
    assert result.exit_code == 0, result.output
    shown = command("inspect-prior", tmp_path / "p", "--out", tmp_path / "pictures")
    assert shown.exit_code == 0, shown.output
    facts = dict(line.split("  ", 1) for line in shown.stdout.splitlines()[:12] if "  " in line)
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["source"] == "generated heads" and facts["license"] == "CC-BY 4.0"
    assert facts["modalities"] == "flair"  # of the networks, not of this command
    assert facts["layout of the scans"] == "openms" and facts["kernel prior"] == "gaussian"
    assert plots(tmp_path / "pictures") == {"kernels.png", "predictive.png"}


def test_a_shared_prior_is_plotted_without_its_kernels(command, in_world, tmp_path):
    """The two files of a prior are enough, with a description of an older version."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("prior.json", "prior.safetensors"):
        (shared / name).write_bytes((in_world / PRIOR / name).read_bytes())
    description = json.loads((shared / "prior.json").read_text())
    widths = {"network": {"widths": [2, 3, 4, 5]}}
    (shared / "prior.json").write_text(json.dumps(description | {"provenance": {"modality": ["flair"], **widths}}))
    plotted = {}
    for folder in (shared, PRIOR):
        out = tmp_path / f"pictures{len(plotted)}"
        result = command("inspect-prior", folder, "--out", out)
        assert result.exit_code == 0, result.output
        assert plots(out) == {"kernels.png", "traversals.png", "predictive.png"}
        plotted[folder] = out
    one, other = (imread(out / "kernels.png").shape for out in plotted.values())
    assert one[0] < other[0]  # one row fewer per block
    same = [(out / "predictive.png").read_bytes() for out in plotted.values()]
    assert same[0] == same[1]


def test_kernels_of_another_network_are_plotted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("k.npy", np.random.default_rng(0).normal(size=(60, 7, 7)))
    assert command("fit-prior", "--kernels", "k.npy", "--family", "gaussian").exit_code == 0
    result = command("inspect-prior", "runs/prior-k")
    assert result.exit_code == 0, result.output
    assert plots(Path("runs/inspect-prior-k")) == {"kernels.png"}
    assert ": block 'all' holds 7×7 kernels" in result.stderr.split("prior predictive")[1]


@pytest.mark.parametrize("damage", ["nowhere", "kernels of other blocks", "damaged kernels"])
def test_invalid_priors_are_not_plotted(command, copy_of_world, damage):
    folder = Path("nowhere") if damage == "nowhere" else Path(PRIOR)
    if damage == "kernels of other blocks":
        path = folder / "prior.json"
        path.write_text(path.read_text().replace("up3.", "up4."))
    elif damage == "damaged kernels":
        (folder / "kernels.safetensors").write_bytes(b"no kernels")
    result = command("inspect-prior", folder, "--out", "pictures")
    line = error_line(result.stderr)
    assert result.exit_code == 2 and str(folder) in line
    assert not Path("pictures").exists()
