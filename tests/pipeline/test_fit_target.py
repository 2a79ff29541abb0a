"""A source network for a target of another number of regions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dwp_pyro.errors import RunError
from dwp_pyro.inference.posterior import Member, NetworkCard, Posterior
from dwp_pyro.models.likelihoods import region_probability
from dwp_pyro.models.networks import NETWORKS
from dwp_pyro.pipeline.fit_target import load_source_network

CARD = NetworkCard(("flair",), ("lesion",), ((1,),), "openms", None, (32, 32, 32), widths=(8, 16, 32, 64))
THREE = {"regions": ("whole", "core", "enhancing"), "values": ((1, 2, 4), (1, 4), (4,)), "layout": "brats"}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_region_starts_from_the_one_of_the_source(tmp_path, name):
    card = replace(CARD, network=name)
    network = card.build()
    torch.nn.init.normal_(list(network.parameters())[-1])
    Posterior(card, [Member(network, None)]).save(tmp_path / "source.safetensors")
    started = load_source_network(tmp_path, replace(card, **THREE), 0)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        one = region_probability(network(image), "sigmoid")
        several = region_probability(started(image), "sigmoid")
        assert_close(several, one.expand(-1, 3, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert one.std() > 1e-3
    assert all(parameter.requires_grad for parameter in started.parameters())


def test_several_regions_do_not_start_others(tmp_path):
    card = replace(CARD, **THREE)
    Posterior(card, [Member(card.build(), None)]).save(tmp_path / "source.safetensors")
    with pytest.raises(RunError, match="segments 3 regions, the target 1; give as many by --region"):
        load_source_network(tmp_path, CARD, 0)
