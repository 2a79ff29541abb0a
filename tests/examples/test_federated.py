"""The federated example: packs on the wire and nothing else, and the product of what the sites sent."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from torch.testing import assert_close

from dwp_pyro.inference.multiply import multiply_posteriors
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.runtime.errors import DataError
from dwp_pyro.runtime.tensors import load_tensors
from dwp_pyro.training.svi import gaussian_prior

pytest.importorskip("flwr", reason="needs the extra 'federated'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "federated"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a module of the example."""
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module


@pytest.mark.slow
def test_three_sites_send_their_posteriors_and_nothing_else(module, tmp_path):
    small = ["--widths", "2,3,4,5", "--prior-steps", "2", "--steps", "2"]
    dice = module("run").main(["--out", str(tmp_path / "federated"), *small])
    sites, server = ("site1", "site2", "site3"), tmp_path / "federated" / "server"
    assert list(dice) == ["prior", *sites, "product"]
    assert all(0 <= value <= 1 for value in dice.values())

    wire = json.loads((server / "wire.json").read_text())
    assert wire.keys() == {"server", *sites}
    assert wire["server"].keys() == {"pack/prior.json", "pack/prior.safetensors", "pack/source.safetensors"}
    sent = {name: server / name / "posterior.safetensors" for name in sites}
    assert {name: wire[name] for name in sites} == {
        name: {"pack/posterior.safetensors": path.stat().st_size} for name, path in sent.items()
    }
    posteriors = {name: Posterior.load(path) for name, path in sent.items()}
    config = posteriors["site1"].network_config
    cases = {path.name for folder in tmp_path.rglob("HGG") for path in folder.iterdir()}
    assert len(cases) == 10
    for path in sent.values():
        tensors, header = load_tensors(path)
        (kernels,) = header["sites"]
        expected = {f"0.{kind}.{site}" for site in kernels for kind in ("loc", "scale", "unit")}
        deterministic = config.build().state_dict().keys() - kernels
        assert tensors.keys() == expected | {f"0.network.{name}" for name in deterministic}
        assert header.keys() == {"format", "network", "decision", "sites"}
        assert max(tensor.numel() for tensor in tensors.values()) < 32**3  # less than the voxels of a scan
        assert not any(case.encode() in path.read_bytes() for case in cases)

    settings = module("packs").SviConfig(prior="gaussian", prior_scale=0.1, prior_dir=str(server / "prior"))
    product = multiply_posteriors(posteriors, gaussian_prior(settings, config))
    assert_close(Posterior.load(server / "product.safetensors").means(), product.means())


def test_a_message_with_anything_else_is_refused(module, tmp_path):
    from flwr.app import ArrayRecord, ConfigRecord

    packs = module("packs")
    (tmp_path / "posterior.safetensors").write_bytes(b"tensors")
    content = packs.pack(tmp_path, packs.POSTERIOR)
    packs.unpack(content, tmp_path / "received", packs.POSTERIOR)
    assert (tmp_path / "received" / "posterior.safetensors").read_bytes() == b"tensors"
    for record, error in (
        (ConfigRecord({"image": b"voxels"}), ValueError),
        (ConfigRecord({"cases": ["PHA_001"]}), TypeError),
        (ArrayRecord([np.zeros((2, 2, 2))]), TypeError),
    ):
        content["more"] = record
        with pytest.raises(error, match="more/"):
            packs.unpack(content, tmp_path / "refused", packs.POSTERIOR)
        assert not (tmp_path / "refused").exists()


def test_a_site_that_fails_tells_the_server_no_case(module, monkeypatch, tmp_path, caplog):
    client = module("client_app")

    def fail(*_: object) -> None:
        raise DataError("patient07: holds no label")

    monkeypatch.setattr(client, "unpack", fail)
    context = SimpleNamespace(node_config={"folder": str(tmp_path)}, run_config={})
    with pytest.raises(RuntimeError, match="training failed; the log of the site says why") as caught:
        client.train(SimpleNamespace(content=None), context)
    assert "patient07" not in str(caught.value) and "patient07" in caplog.text
