"""`multiply_posteriors` against exact posteriors of all data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.multiply import multiply_posteriors
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.runtime.errors import RunError
from tests.conftest import random_density

CONFIG = NetworkConfig(("flair",), ("lesion",), ((1,),), "openms", None, (16, 16, 16), widths=(2, 2, 3, 3))
SITE = "down1.conv1.weight"
SHAPE = CONFIG.build().get_parameter(SITE).shape
WIDTH = 0.3  # of the prior


def posterior(loc: Tensor, scale: Tensor | float, unit: Tensor, site: str = SITE, **changes: object) -> Posterior:
    config = replace(CONFIG, **changes)
    guide = MeanFieldNormal({site: loc}, units={site: unit})
    guide.set_scale(site, torch.as_tensor(scale).expand(loc.shape))
    return Posterior(config, [Member(config.build(), guide)])


@pytest.fixture
def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.double)


@pytest.fixture(params=["root", "diagonal", "number"])
def unit(request: pytest.FixtureRequest) -> Tensor:
    root = random_density("gaussian").scale_tril
    return {"root": root, "diagonal": root.diagonal().clone(), "number": root[0, 0].clone()}[request.param]


def as_matrix(unit: Tensor) -> Tensor:
    return unit if unit.dim() == 2 else unit.expand(27).diag()


def test_the_product_is_the_posterior_of_all_data(start, unit):
    """Linear regressions with orthogonal designs at three sites, whose posteriors are exact mean fields."""
    root, noise = as_matrix(unit), 0.5
    inverse = torch.linalg.inv(root)
    precision = inverse.T @ inverse / WIDTH**2
    weighted = start.flatten(2) @ precision
    posteriors = {}
    for name in ("oslo", "lima", "quito"):
        size = 0.1 + 3 * torch.rand(27, dtype=torch.double)
        features = torch.linalg.qr(torch.randn(40, 27, dtype=torch.double))[0] * size  # X A
        design = features @ inverse
        answers = torch.randn(*SHAPE[:2], 40, dtype=torch.double)
        precision = precision + design.T @ design / noise**2
        weighted = weighted + answers @ design / noise**2

        of_site = 1 / WIDTH**2 + size.square() / noise**2
        shift = (answers - start.flatten(2) @ design.T) @ features / noise**2 / of_site
        loc = start + (shift @ root.T).view(SHAPE)
        posteriors[name] = posterior(loc, of_site.rsqrt().view(SHAPE[2:]), unit)

    guide = multiply_posteriors(posteriors, posterior(start, WIDTH, unit)).members[0].guide
    scale = guide.scale(SITE).detach().flatten(2)[0, 0]
    assert_close(root * scale.square() @ root.T, torch.linalg.inv(precision), rtol=1e-6, atol=1e-6)
    assert_close(guide.means()[SITE].flatten(2), weighted @ torch.linalg.inv(precision), rtol=1e-6, atol=1e-6)


def test_one_posterior_is_its_own_product(start, unit):
    alone = posterior(start + 1, 0.1, unit)
    product = multiply_posteriors({"oslo": alone}, posterior(start, WIDTH, unit))
    assert_close(product.means()[SITE], start + 1)
    assert_close(product.members[0].guide.scale(SITE), alone.members[0].guide.scale(SITE))
    assert_close(product.means(), alone.means() | {SITE: start + 1})


def test_a_posterior_wider_than_the_prior_counts_as_wide_as_the_prior(start, unit):
    """Without that, the precisions 1/9 + 1/9 − 1 of the second product, in units of the prior's, would be negative."""
    prior = posterior(start, WIDTH, unit)
    wide, as_prior = posterior(start + 1, 3 * WIDTH, unit), posterior(start + 1, WIDTH, unit)
    narrow = posterior(start - 1, 0.1, unit)
    products = [multiply_posteriors({"oslo": narrow, "lima": lima}, prior) for lima in (wide, as_prior)]
    assert_close(products[0].means()[SITE], products[1].means()[SITE])
    assert_close(products[0].members[0].guide.scale(SITE), products[1].members[0].guide.scale(SITE))
    both = multiply_posteriors({"oslo": wide, "lima": wide}, prior)
    assert_close(both.members[0].guide.scale(SITE), prior.members[0].guide.scale(SITE))
    assert_close(both.means()[SITE], start + 2)


def test_other_weights_are_averages_and_nothing_else_changes(start, unit):
    prior, sites = posterior(start, WIDTH, unit), {name: posterior(start, 0.1, unit) for name in ("oslo", "lima")}
    before = prior.means()
    product = multiply_posteriors(sites, prior).means()
    oslo, lima = (sites[name].means() for name in sites)
    assert not torch.equal(oslo["output.weight"], lima["output.weight"])
    for name in product.keys() - {SITE}:
        assert_close(product[name], (oslo[name] + lima[name]) / 2)
    assert_close(prior.means(), before, rtol=0, atol=0)


def test_scans_of_sites_may_differ_in_layout_labels_and_patch(start, unit):
    other = posterior(start, 0.1, unit, layout="bids", values=((2,),), patch=(8, 8, 8))
    assert multiply_posteriors({"oslo": other}, posterior(start, WIDTH, unit)).network_config == CONFIG


def test_posteriors_that_do_not_fit_are_refused(start):
    unit = random_density("gaussian").scale_tril
    prior, fits = posterior(start, WIDTH, unit), posterior(start, 0.1, unit)
    members = fits.members
    for other, message in [
        (Posterior(CONFIG, members * 2), "lima: is a mixture"),
        (Posterior(CONFIG, [Member(CONFIG.build(), None)]), "lima: is deterministic"),
        (posterior(start, 0.1, unit, widths=(2, 3, 4, 5)), r"lima: its network has widths \(2, 3, 4, 5\)"),
        (posterior(start, 0.1, unit, modalities=("t1",)), "lima: its network has modalities .*'t1'"),
        (posterior(start, 0.1, unit, site="down1.conv2.weight"), "lima: has the sites .*conv2"),
        (posterior(start, 0.1, 1.01 * unit), f"lima: was trained under another prior.*'{SITE}'"),
        (posterior(start, 0.1, unit.diagonal().clone()), f"lima: its unit at '{SITE}' has shape .*weight-sample"),
    ]:
        with pytest.raises(RunError, match=message) as caught:
            multiply_posteriors({"oslo": fits, "lima": other}, prior)
        assert "\n" not in str(caught.value)
