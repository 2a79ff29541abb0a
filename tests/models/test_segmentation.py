"""Likelihoods against hand calculations, and the scales of the Pyro program."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.models.likelihoods import (
    ACTIVATIONS,
    LIKELIHOODS,
    categorical,
    choose_activation,
    dice_ce,
    region_masks,
    region_probability,
)
from dwp_pyro.models.segmentation import LOG_PRIOR, SegmentationModel

EPSILON = 6e-5


@pytest.fixture
def by_hand() -> tuple[Tensor, Tensor, Tensor]:
    """Return a row of four voxels with lesion probabilities .5, .75, .25 and, outside the brain, .9."""
    lesion = torch.tensor([0.5, 0.75, 0.25, 0.9], dtype=torch.double).reshape(1, 1, 4, 1, 1)
    logits = torch.cat([1 - lesion, lesion], 1).log() + 3.0  # a softmax ignores a constant
    label = torch.tensor([0, 1, 1, 0]).reshape(1, 1, 4, 1, 1)
    brain_mask = torch.tensor([1.0, 1, 1, 0], dtype=torch.double).reshape(1, 1, 4, 1, 1)
    return logits, label, brain_mask


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_categorical_by_hand(by_hand, activation):
    """log(½ · ¾ · ¼) / 3: voxels outside the brain do not count; softmax and sigmoid agree for one region."""
    assert_close(categorical(*by_hand, activation), torch.tensor([math.log(3 / 32) / 3], dtype=torch.double))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", [0.5, 0.99])
def test_dice_ce_by_hand(by_hand, activation, weight):
    """Overlap 1, sizes 1.5 and 2, of three voxels: Dice (2/3 + ε) / (3.5/3 + ε); mean cross-entropy −log(3/32) / 3."""
    dice = (2 / 3 + EPSILON) / (3.5 / 3 + EPSILON)
    expected = -(weight * (1 - dice) + (1 - weight) * -math.log(3 / 32) / 3)
    assert_close(dice_ce(*by_hand, activation, weight), torch.tensor([expected], dtype=torch.double))


def test_regions_overlap_and_dice_averages_them():
    """Two regions of two voxels, the second inside the first: each has its own sigmoid, Dice and cross-entropy."""
    sure = torch.tensor([[0.0, 0], [60, 60], [-60, 60]]).double().reshape(1, 3, 2, 1, 1) + 5  # whole: both; core: one
    label = torch.tensor([[1, 1], [1, 0]]).reshape(1, 2, 2, 1, 1)
    brain_mask = torch.ones(1, 1, 2, 1, 1, dtype=torch.double)
    # whole: Dice 1; core: overlap 0, sizes 1/2 + 1/2 → ε / (1 + ε). Cross-entropy of core: (60 + 60) / 2.
    expected = -(0.5 * (1 - (1 + EPSILON / (1 + EPSILON)) / 2) + 0.5 * 60 / 2)
    assert_close(dice_ce(sure, label, brain_mask), torch.tensor([expected], dtype=torch.double))
    assert_close(categorical(sure, label, brain_mask), torch.tensor([-60.0], dtype=torch.double))


def test_one_region_is_the_softmax_of_two_classes():
    logits = torch.randn(1, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert_close(region_probability(logits, "sigmoid"), region_probability(logits, "softmax"))
    assert_close(region_probability(logits, "softmax"), logits.softmax(1)[:, 1:])


def test_disjoint_regions_are_classes_by_hand():
    """Two voxels, probabilities ½, ¼, ¼ and ⅛, ⅝, ¼ of background and two classes; the labels are 0 and 2."""
    p = torch.tensor([[1 / 2, 1 / 8], [1 / 4, 5 / 8], [1 / 4, 1 / 4]], dtype=torch.double).reshape(1, 3, 2, 1, 1)
    label = torch.tensor([[0, 0], [0, 1]]).reshape(1, 2, 2, 1, 1)
    batch = p.log() + 2, label, torch.ones(1, 1, 2, 1, 1, dtype=torch.double)
    cross_entropy = -(math.log(1 / 2) + math.log(1 / 4)) / 2
    assert_close(categorical(*batch, "softmax"), torch.tensor([-cross_entropy], dtype=torch.double))
    # Class 1: overlap 0, sizes 7/16 + 0; class 2: overlap 1/8, sizes 1/4 + 1/2.
    dice = (EPSILON / (7 / 16 + EPSILON) + (1 / 4 + EPSILON) / (3 / 4 + EPSILON)) / 2
    expected = -(0.3 * (1 - dice) + 0.7 * cross_entropy)
    assert_close(dice_ce(*batch, "softmax", 0.3), torch.tensor([expected], dtype=torch.double))


def test_the_labels_determine_whether_regions_are_exclusive():
    assert choose_activation([{1}]) == choose_activation([{1, 2}, {3}, {4}]) == "softmax"
    assert choose_activation([{1, 2, 4}, {1, 4}, {4}]) == "sigmoid"


def test_masks_of_classes_exclude_each_other():
    """The most probable class: background of .4, .3, .3; class 2 of .35, .25, .4, below 1/2; class 1 of .3, .6, .1."""
    p = torch.tensor([[0.3, 0.25, 0.6], [0.3, 0.4, 0.1]]).reshape(2, 3, 1, 1)
    assert region_masks(p, "softmax").flatten(1).tolist() == [[False, False, True], [False, True, False]]
    assert region_masks(p, "sigmoid").flatten(1).tolist() == [[False, False, True], [False, False, False]]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no likelihood 'dice' with activation 'softmax'"):
        SegmentationModel(nn.Identity(), "dice", 1, activation="softmax")


@pytest.mark.parametrize("name", LIKELIHOODS)
class TestEveryLikelihood:
    def test_nothing_outside_the_brain_counts(self, by_hand, name):
        logits, label, brain_mask = by_hand
        logits.requires_grad_()
        before = LIKELIHOODS[name](logits, label, brain_mask)
        (gradient,) = torch.autograd.grad(before.sum(), logits)
        assert (gradient[0, :, :3] != 0).all()
        assert (gradient[0, :, 3] == 0).all()
        assert_close(LIKELIHOODS[name](logits, torch.where(brain_mask > 0, label, 1 - label), brain_mask), before)

    def test_a_volume_counts_alike_at_every_resolution(self, name):
        """Every voxel repeated 2³ and 3³ times."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.double)
        label = (torch.rand(2, 2, 4, 5, 6, generator=generator) < 0.2).long()
        brain_mask = (torch.rand(2, 1, 4, 5, 6, generator=generator) < 0.8).double()
        once = LIKELIHOODS[name](logits, label, brain_mask)
        for times in (2, 3):
            repeated = (_repeated(volume, times) for volume in (logits, label, brain_mask))
            assert_close(LIKELIHOODS[name](*repeated), once, rtol=1e-12, atol=0)

    def test_a_smooth_field_counts_alike_at_every_spacing(self, name):
        """A ball of radius 12 mm in a cube of 60 mm, its logit the distance from its surface; voxels of 1, 2, 3 mm."""
        values = []
        for spacing in (1, 2, 3):
            centers = (torch.arange(60 // spacing, dtype=torch.double) + 0.5) * spacing - 30
            x, y, z = torch.meshgrid(centers, centers, centers, indexing="ij")
            inside = (12 - (x**2 + y**2 + z**2).sqrt())[None, None]
            logits = torch.cat([torch.zeros_like(inside), inside / 4], 1)
            values.append(LIKELIHOODS[name](logits, (inside > 0).long(), torch.ones_like(inside)))
        assert_close(torch.cat(values), values[0].expand(3), rtol=0.02, atol=0)

    def test_cases_are_independent(self, by_hand, name):
        """One number per case, independent of the others."""
        logits, label, brain_mask = by_hand
        other = 2 * logits, label, brain_mask
        values = LIKELIHOODS[name](*(torch.cat(pair) for pair in zip(by_hand, other, strict=True)))
        assert_close(values, torch.cat([LIKELIHOODS[name](*by_hand), LIKELIHOODS[name](*other)]))
        assert values[0] != values[1]

    def test_a_patch_without_brain_is_finite(self, by_hand, name):
        logits, label, brain_mask = by_hand
        logits.requires_grad_()
        value = LIKELIHOODS[name](logits, label, 0 * brain_mask)
        value.sum().backward()
        assert_close(value, torch.zeros(1, dtype=torch.double))
        assert (logits.grad == 0).all()


def _repeated(volume: Tensor, times: int) -> Tensor:
    for axis in (2, 3, 4):
        volume = volume.repeat_interleave(times, axis)
    return volume


@pytest.mark.parametrize("bayesian", [False, True])
def test_the_program_scales_the_likelihood_alone(scene, bayesian):
    """log p = N/B λ Σ log p(y|x, W) + log p(W), composed of its parts."""
    tiny = scene("normal", "dice-ce")
    weights = tiny.guide.draw()
    network = poutine.condition(tiny.model.network, weights)
    batch = [x[:2] for x in tiny.data]
    trace = poutine.trace(poutine.condition(tiny.model, weights)).get_trace(*batch)
    likelihood = dice_ce(network(batch[0]), *batch[1:]).sum()
    prior = sum(torch.distributions.Normal(0.0, 1.0).log_prob(w).sum() for w in weights.values())
    assert_close(trace.log_prob_sum(), 3 / 2 * 50 * likelihood + prior)
    assert_close(trace.nodes["_RETURN"]["value"], network(batch[0]))


@pytest.mark.parametrize("elbo", [Trace_ELBO, MeanFieldELBO])
def test_l2_sp_is_a_quadratic_about_the_start(scene, elbo):
    """−α/2 Σ (θ − θ₀)² over all weights, not scaled by the plate, with its gradient."""
    data = [x[:2] for x in scene("normal").data]
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 1)).double()
    model = SegmentationModel(network, "categorical", 6, l2_sp=3.0)
    free = SegmentationModel(network, "categorical", 6)
    assert not any(name.startswith("start") for name, p in model.named_parameters() if p.requires_grad)

    def gap() -> tuple[float, Tensor]:
        losses, gradients = [], []
        for each in (model, free):
            network.zero_grad()
            losses.append(elbo().loss_and_grads(each, lambda *args: None, *data))
            gradients.append(parameters_to_vector([p.grad for p in network.parameters()]))
        return losses[0] - losses[1], gradients[0] - gradients[1]

    start = parameters_to_vector(network.parameters()).detach().clone()
    loss, gradient = gap()
    assert_close(loss, 0.0)
    assert (gradient == 0).all()
    moved = start + torch.randn_like(start)
    vector_to_parameters(moved, network.parameters())
    loss, gradient = gap()
    assert_close(loss, 1.5 * (moved - start).square().sum().item())
    assert_close(gradient, 3.0 * (moved - start))
    factor = poutine.trace(model).get_trace(*data).nodes[LOG_PRIOR]["fn"].log_factor
    assert_close(factor, -1.5 * (moved - start).square().sum())


@pytest.mark.parametrize("elbo", [Trace_ELBO, MeanFieldELBO])
def test_without_sites_the_elbo_is_the_log_likelihood(scene, elbo):
    """Deterministic methods: a plain network, a guide without sites, gradients for every parameter."""
    data = [x[:2] for x in scene("normal").data]
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1)).double()
    loss = elbo().loss_and_grads(SegmentationModel(network, "categorical", 6), lambda *args: None, *data)
    assert_close(loss, -3 * categorical(network(data[0]), *data[1:]).sum().item())
    assert all((p.grad != 0).any() for p in network.parameters())


def test_in_bf16_the_network_alone_is_rounded():
    """Logits and likelihood are float32, near those without autocast and not equal; every weight has a gradient."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))
    data = torch.randn(2, 1, 8, 8, 8), torch.ones(2, 1, 8, 8, 8), torch.ones(2, 1, 8, 8, 8)
    computed_in = []
    network[0].register_forward_hook(lambda module, inputs, output: computed_in.append(output.dtype))
    exact, rounded = (
        SegmentationModel(network, "dice-ce", 2, precision=precision)(*data) for precision in ("float32", "bf16")
    )
    assert computed_in == [torch.float32, torch.bfloat16]
    assert rounded.dtype == torch.float32
    assert_close(rounded, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(rounded, exact)
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
