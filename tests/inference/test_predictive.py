"""Streaming moments against their definition, with one weight sample for a whole scan."""

import math
import threading
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference import predictive as module
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import Member, NetworkConfig, Posterior
from dwp_pyro.inference.predictive import posterior_mean_probability, posterior_predictive
from dwp_pyro.models.likelihoods import region_probability
from dwp_pyro.priors.blocks import kernel_sites
from dwp_pyro.runtime.errors import RunError

NETWORK = NetworkConfig(
    modalities=("flair", "t1"),
    regions=("whole",),
    values=((1, 2, 4),),
    layout="brats",
    spacing=None,
    patch=(16, 16, 16),
    widths=(2, 2, 3, 3),
)


def make_posterior(scale: float | None, seed: int = 0) -> Posterior:
    torch.manual_seed(seed)
    network = NETWORK.build()
    torch.nn.init.normal_(network.output.weight)  # the default initialization is too small for disagreement
    guide = None if scale is None else MeanFieldNormal(kernel_sites(network), scale)
    return Posterior(NETWORK, [Member(network, guide)])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 16, 16, 16)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_moments_are_those_of_the_samples(image, samples):
    posterior = make_posterior(0.2)
    seeds = range(samples)
    moments = posterior_predictive(posterior, image, seeds)
    with torch.no_grad():
        p = torch.stack([posterior.logits(image[None], posterior.draw(s)).softmax(1)[0, 1:] for s in seeds])

    def entropy(q: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(q) + torch.special.entr(1 - q)

    torch.testing.assert_close(moments.probability, p.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(moments.entropy, entropy(p.mean(0)), atol=1e-4, rtol=0)
    expected = entropy(p.mean(0)) - entropy(p).mean(0)
    torch.testing.assert_close(moments.mutual_information, expected.clamp_min(0), atol=1e-4, rtol=0)
    assert (float(moments.mutual_information.max()) > 0.01) == (samples > 1)  # one sample agrees with itself
    assert float(moments.entropy.max()) <= math.log(2) + 1e-6


def test_pairwise_dice_is_the_mean_over_all_pairs_of_samples(image):
    """Inside the brain mask, if there is one; a single sample has no pair."""
    posterior, seeds = make_posterior(0.2, seed=3), range(4)  # this seed segments part of the image
    with torch.no_grad():
        p = torch.stack([posterior.logits(image[None], posterior.draw(s)).softmax(1)[0, 1] for s in seeds])
    brain_mask = torch.rand(16, 16, 16) < 0.3
    for where in (None, brain_mask):
        segmented = (p > 0.5) if where is None else (p > 0.5) & where
        dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(segmented, 2)]
        moments = posterior_predictive(posterior, image, seeds, brain_mask=where)
        assert moments.pairwise_dice[0] == pytest.approx(float(torch.stack(dice).mean()), abs=1e-3)
        assert 0 < moments.pairwise_dice[0] < 1
    assert posterior_predictive(make_posterior(1e-6, seed=3), image, [0, 1, 2]).pairwise_dice[0] > 0.99
    assert math.isnan(posterior_predictive(posterior, image, [0]).pairwise_dice[0])


def test_pairwise_dice_is_of_the_segmentations_that_the_threshold_makes(image, monkeypatch):
    """Two timid passes that overlap by half: all are below 1/2, and that is no agreement."""
    passes = torch.zeros(2, 16, 16, 16)
    passes[0, 4:8], passes[1, 6:10] = 0.45, 0.45
    upcoming = iter(passes)

    def logits(self, window, weights):
        return torch.stack([torch.zeros(1, 16, 16, 16), next(upcoming)[None].logit()], 1)

    monkeypatch.setattr(Posterior, "logits", logits)
    timid = posterior_predictive(make_posterior(0.2), image, [0, 1], decision=Decision("expected-dice"))
    assert timid.pairwise_dice == (pytest.approx(0.5),)


def test_a_sample_is_drawn_once_for_all_windows(image, monkeypatch):
    posterior = make_posterior(0.2)
    large = torch.randn(2, 40, 24, 20)
    seen = []
    original = Posterior.logits

    def spy(self, window, kernels):
        seen.append(kernels["input.weight"].flatten()[:3].tolist())
        return original(self, window, kernels)

    monkeypatch.setattr(Posterior, "logits", spy)
    posterior_predictive(posterior, large, [3, 4])
    windows = len(seen) // 2
    assert windows > 1
    assert all(seen[i] == seen[0] for i in range(windows))
    assert all(seen[windows + i] == seen[windows] for i in range(windows))
    assert seen[0] != seen[windows]


def test_without_spread_samples_agree_and_equal_the_mean(image):
    posterior = make_posterior(1e-6)
    moments = posterior_predictive(posterior, image, [0, 1, 2])
    assert float(moments.mutual_information.max()) < 1e-4
    torch.testing.assert_close(moments.probability, posterior_mean_probability(posterior, image), atol=1e-4, rtol=0)


def test_without_seeds_there_is_one_pass_per_member(image):
    """The mutual information is the disagreement of the members."""
    members = [make_posterior(0.5, seed).members[0] for seed in (0, 1)]
    moments = posterior_predictive(Posterior(NETWORK, members), image, None)
    each = [posterior_predictive(Posterior(NETWORK, [member]), image, None) for member in members]
    torch.testing.assert_close(moments.probability, (each[0].probability + each[1].probability) / 2, atol=1e-5, rtol=0)
    expected = moments.entropy - (each[0].entropy + each[1].entropy) / 2
    torch.testing.assert_close(moments.mutual_information, expected.clamp_min(0), atol=1e-4, rtol=0)
    assert float(moments.mutual_information.max()) > 0.01
    assert float(each[0].mutual_information.max()) < 1e-6
    mean = posterior_mean_probability(Posterior(NETWORK, members), image)
    torch.testing.assert_close(moments.probability, mean, atol=1e-5, rtol=0)


def test_in_bf16_the_maps_are_near_those_of_float32(image):
    posterior = make_posterior(0.2)
    exact, rounded = (posterior_predictive(posterior, image, [0, 1], precision=name) for name in ("float32", "bf16"))
    assert rounded.probability.dtype == torch.float32
    torch.testing.assert_close(rounded.probability, exact.probability, atol=0.03, rtol=0)
    assert not torch.equal(rounded.probability, exact.probability)


def test_a_deterministic_network_has_no_mutual_information(image):
    moments = posterior_predictive(make_posterior(None), image, [0])
    assert float(moments.mutual_information.max()) == 0
    assert float(moments.entropy.max()) > 0


def test_memory_does_not_grow_with_the_samples(image):
    """The number of live tensors is the same at the last sample as at the second."""
    posterior = make_posterior(0.2)
    alive = []

    def count() -> None:
        import gc

        alive.append(sum(isinstance(o, torch.Tensor) and o.shape == (1, 16, 16, 16) for o in gc.get_objects()))

    posterior_predictive(posterior, image, range(8), advance=count)
    assert alive[1] == alive[-1]


@pytest.mark.parametrize("scale", [0.2, None])
def test_the_members_of_a_mixture_take_turns(image, tmp_path, scale):
    """The moments are those of each member's own samples, also after saving and loading."""
    one, two = (make_posterior(scale, seed) for seed in (0, 1))
    mixture = Posterior(NETWORK, [*one.members, *two.members])
    seeds = range(4)
    mixture.save(tmp_path / "p.safetensors")
    moments = posterior_predictive(Posterior.load(tmp_path / "p.safetensors"), image, seeds)
    with torch.no_grad():
        p = torch.stack(
            [(one, two)[s % 2].logits(image[None], (one, two)[s % 2].draw(s)).softmax(1)[0, 1:] for s in seeds]
        )
    torch.testing.assert_close(moments.probability, p.mean(0), atol=1e-5, rtol=0)
    assert float(moments.mutual_information.max()) > 0.01
    each = [posterior_mean_probability(posterior, image) for posterior in (one, two)]
    torch.testing.assert_close(posterior_mean_probability(mixture, image), sum(each) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.2, None])
def test_a_posterior_is_saved_and_loaded(image, tmp_path, scale):
    posterior = make_posterior(scale)
    posterior.save(tmp_path / "p.safetensors")
    loaded = Posterior.load(tmp_path / "p.safetensors")
    assert loaded.network_config == NETWORK
    a, b = (posterior_predictive(p, image, [5, 6]) for p in (posterior, loaded))
    torch.testing.assert_close(a.probability, b.probability, atol=1e-5, rtol=0)


def test_a_file_without_a_posterior_is_rejected(tmp_path):
    from dwp_pyro.runtime.tensors import save_tensors

    path = tmp_path / "p.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(RunError, match="p.safetensors: has format None"):
        Posterior.load(path)
    make_posterior(0.1).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="damaged"):
        Posterior.load(path)


def test_a_site_that_is_not_a_kernel_is_rejected(tmp_path):
    from dwp_pyro.runtime.tensors import load_tensors, save_tensors

    path = tmp_path / "p.safetensors"
    make_posterior(0.1).save(path)
    tensors, metadata = load_tensors(path)
    tensors["0.loc.norm.weight"] = tensors.pop("0.network.norm.weight")
    tensors |= {f"0.{part}.norm.weight": torch.ones(2) for part in ("unit", "scale")}
    save_tensors(path, tensors, metadata | {"sites": [[*metadata["sites"][0], "norm.weight"]]})
    with pytest.raises(RunError, match="does not hold a network of this version"):
        Posterior.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"regions": ("../x",)},
        {"regions": ("/x",)},
        {"regions": ()},
        {"values": ()},
        {"values": ((),)},
        {"network": "transformer"},
    ],
)
def test_an_invalid_network_config_is_rejected(tmp_path, change):
    """Region names become parts of file names."""
    posterior = make_posterior(0.1)
    posterior.network_config = replace(NETWORK, **change)
    posterior.save(tmp_path / "p.safetensors")
    with pytest.raises(RunError, match="p.safetensors: does not hold a network"):
        Posterior.load(tmp_path / "p.safetensors")


def test_each_region_has_its_own_maps_and_pairwise_dice(image):
    network_config = replace(NETWORK, regions=("whole", "core"), values=((1, 2, 4), (1, 4)))
    torch.manual_seed(3)
    network = network_config.build()
    torch.nn.init.normal_(network.output.weight)
    posterior = Posterior(network_config, [Member(network, MeanFieldNormal(kernel_sites(network), 0.2))])
    with torch.no_grad():
        logits = [posterior.logits(image[None], posterior.draw(s)) for s in (0, 1)]
        p = torch.stack([region_probability(each, "sigmoid")[0] for each in logits])
    moments = posterior_predictive(posterior, image, [0, 1])
    torch.testing.assert_close(moments.probability, p.mean(0), atol=1e-5, rtol=0)
    a, b = p > 0.5
    dice = 2 * (a & b).flatten(1).sum(1) / (a.flatten(1).sum(1) + b.flatten(1).sum(1))
    assert moments.pairwise_dice == pytest.approx(dice.tolist(), abs=1e-3)
    assert abs(moments.pairwise_dice[0] - moments.pairwise_dice[1]) > 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_raises(image, value):
    """On the first sample."""
    image[0, 8, 8, 8] = value
    with pytest.raises(RunError, match="NaN"):
        posterior_predictive(make_posterior(0.2), image, [0, 1, 2])


def test_members_keep_their_weights_during_a_pass(image):
    """The next sample is drawn at the same time."""
    posterior, other = make_posterior(0.2, 0), make_posterior(0.2, 1)
    own, weights = posterior.draw(0), other.draw(0)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(posterior.draw(0)))
    try:
        posterior.logits(image[None], weights)
    finally:
        hook.remove()
    assert len(seen) > 10
    assert all(torch.equal(each[name], own[name]) for each in seen for name in own)


def test_draws_in_a_thread_change_nothing(image, monkeypatch):
    """Draws are in a thread for a GPU, but not on a CPU, where a second thread would slow the passes."""
    posterior, threads = make_posterior(0.2), []
    draw = posterior.draw

    def recorded(*arguments):
        threads.append(threading.current_thread())
        return draw(*arguments)

    monkeypatch.setattr(posterior, "draw", recorded)
    inline = posterior_predictive(posterior, image, range(4))
    assert threads == [threading.current_thread()] * 4
    monkeypatch.setattr(module, "_draw_ahead", lambda executor, draw, device: executor.submit(draw).result)
    threaded = posterior_predictive(posterior, image, range(4))
    assert len(threads) == 8 and threading.current_thread() not in threads[4:]
    for name in ("probability", "entropy", "mutual_information"):
        assert torch.equal(getattr(threaded, name), getattr(inline, name))
    assert threaded.pairwise_dice == inline.pairwise_dice


def test_certain_voxels_have_no_entropy(image, monkeypatch):
    """At probabilities of exactly 0 and 1 the entropy is 0, not NaN."""

    def logits(self, window, weights):
        return torch.stack([torch.zeros_like(window[:, 0]), 200 * window[:, 0].sign()], 1)

    monkeypatch.setattr(Posterior, "logits", logits)
    moments = posterior_predictive(make_posterior(0.2), image, [0, 1])
    certain = [moments.probability == value for value in (0, 1)]
    assert all(each.any() for each in certain)
    assert all((moments.entropy[each] == 0).all() for each in certain)
    assert moments.entropy.isfinite().all() and not moments.entropy.signbit().any()
    assert (moments.mutual_information == 0).all()


def test_mirrored_passes_take_turns(image):
    """Passes 0 to 3 of one member: plain, mirrored, plain, mirrored."""
    posterior = make_posterior(0.2)
    moments = posterior_predictive(posterior, image, range(4), decision=Decision(mirror=("x",)))
    plain = posterior_predictive(posterior, image, [0, 2])
    mirrored = posterior_predictive(posterior, image.flip(1), [1, 3])
    expected = (plain.probability + mirrored.probability.flip(1)) / 2
    torch.testing.assert_close(moments.probability, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(moments.probability, posterior_predictive(posterior, image, range(4)).probability)
    # With kernels at their means, each member has one pass per flip.
    means = posterior_predictive(posterior, image, None, decision=Decision(mirror=("x",)))
    each = posterior_mean_probability(posterior, image), posterior_mean_probability(posterior, image.flip(1)).flip(1)
    torch.testing.assert_close(means.probability, sum(each) / 2, atol=1e-5, rtol=0)


def test_the_decision_is_saved_with_the_posterior(tmp_path):
    posterior = make_posterior(0.2)
    posterior.decision = Decision("expected-dice", 0.25, ("x",))
    posterior.save(tmp_path / "p.safetensors")
    assert Posterior.load(tmp_path / "p.safetensors").decision == posterior.decision


def test_a_mean_that_rounds_to_more_than_one_has_no_entropy():
    assert (module.binary_entropy(torch.tensor([1 + 2e-7, 1.0, 0.0])) == 0).all()
