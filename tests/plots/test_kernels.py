"""Model card and latent usage of a prior."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.runtime.table import markdown

NETWORK = {"modalities": ["t1", "flair"], "widths": [2, 3, 4, 5], "spacing": 3.0}


def prior(**provenance: object) -> KernelPrior:
    nats = {"prior": 1.25, "full_gaussian": 1.0}
    blocks = {"input": KernelVAE((3, 3, 3)), "up": KernelVAE((5, 5))}
    block_infos = {"input": BlockInfo(("a.weight", "b.weight"), 10, nats), "up": BlockInfo(("*",), 20)}
    return KernelPrior("dwp", blocks, block_infos, provenance)


def test_a_card_of_all_that_a_prior_can_say():
    stated = prior(source="Set (A. et al.)", license="CC-BY 4.0", network=NETWORK, bootstraps=5, snapshots=15)
    facts, blocks = model_card(stated)
    found = dict(facts.rows)
    assert facts.header == ["kernel prior", "dwp"]
    assert found["source"] == "Set (A. et al.)" and found["license"] == "CC-BY 4.0"
    assert found["modalities"] == "t1, flair" and found["voxels"] == "3.0 mm"
    assert found["source networks"] == "5, 15 snapshots" and found["kernels"] == "30 in 2 blocks"
    assert blocks.rows == [
        ["input", "2", "3×3×3", "10", "1.0000", "1.2", "1.0"],
        ["up", "every site", "5×5", "20", "1.0000", "-", "-"],
    ]
    assert "| license | CC-BY 4.0 |" in markdown((facts, blocks))


def test_what_an_old_prior_does_not_say_is_not_made_up():
    facts, _ = model_card(prior(modality=["flair"], dataset=None))
    found = dict(facts.rows)
    assert found.pop("modalities") == "flair"
    assert found.pop("kernels") == "30 in 2 blocks"
    assert set(found.values()) == {"not stated"}
    assert not {"kernel file", "merged from", "privacy"} & found.keys()


def test_priors_made_before_there_was_a_card_have_one():
    folders = sorted((Path(__file__).parents[2] / "studies/archive/whole-tumour/priors").iterdir())
    assert [folder.name for folder in folders] == ["dwp", "gaussian", "mixture"]
    for folder in folders:
        facts, blocks = model_card(KernelPrior.load(folder))
        found = dict(facts.rows)
        assert facts.header[1] == folder.name and len(blocks.rows) == 7
        assert found["source networks"] == "5, 15 snapshots" and found["license"] == "not stated"


def test_how_much_a_latent_dimension_is_used():
    """For a linear encoder r(z|u) = N((2u₁, 0), (0.5², 1)), so KL = (½(4ū² + ¼ − 1) + log 2, 0)."""
    vae = KernelVAE((2,), 2, ())
    with torch.no_grad():
        encoder = vae.encoder[-1]
        assert isinstance(encoder, nn.Linear)
        encoder.weight[0, 0] = 2
        encoder.bias[2] = torch.tensor(0.5).log()
    w = torch.tensor([[1.0, 7], [-2, 0]])
    expected = torch.tensor([0.5 * (4 * 2.5 + 0.25 - 1) + torch.tensor(2.0).log(), 0])
    torch.testing.assert_close(vae.latent_divergence(w), expected)
