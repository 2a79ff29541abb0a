"""Noise by two cores: standard normal, from the seed alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from dwp_pyro.distributions import standard_normal as module
from dwp_pyro.distributions.standard_normal import standard_normals_like


@pytest.mark.parametrize("size", [(999,), (11, 9), (3, 5, 67)])
def test_large_tensors_are_shared_and_standard_normal(monkeypatch, size):
    """Shared from here on, odd sizes too; the two halves are no copies of each other."""
    monkeypatch.setattr(module, "_SHARED_FROM", 1)
    torch.manual_seed(1)
    draws = torch.stack([standard_normals_like([torch.empty(size)])[0] for _ in range(200)])
    assert draws.shape == (200, *size)
    assert stats.kstest(draws.flatten(), "norm").pvalue > 0.01
    first, second = draws.flatten(1).chunk(2, 1)
    length = second.shape[1]
    assert abs(float((first[:, :length] * second).mean())) < 4 / (200 * length) ** 0.5


def test_the_seed_says_what_is_drawn(monkeypatch):
    monkeypatch.setattr(module, "_SHARED_FROM", 1)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append([standard_normals_like([torch.empty(1001)])[0] for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("shared_from", [1, 10**6])
def test_a_generator_says_what_is_drawn(monkeypatch, shared_from):
    """And nothing else does: not the seed, and that is left alone."""
    monkeypatch.setattr(module, "_SHARED_FROM", shared_from)
    state = torch.get_rng_state()
    generator = torch.Generator()
    draws = [standard_normals_like([torch.empty(1001)], generator.manual_seed(seed))[0] for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_drawn_does_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(module, "_SHARED_FROM", 1)
    draws = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(2)
        draws.append(standard_normals_like([torch.empty(1001)])[0])
    torch.manual_seed(2)
    with torch.inference_mode():
        draws.append(standard_normals_like([torch.empty(1001)])[0])
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_several_tensors_are_drawn_together(monkeypatch):
    """Each in its own shape, cut where the two halves meet, and none a copy of another; a half for each core."""
    monkeypatch.setattr(module, "_SHARED_FROM", 1)
    fill, sizes = module._fill, []
    monkeypatch.setattr(module, "_fill", lambda half, seed: sizes.append(sum(map(len, half))) or fill(half, seed))
    torch.manual_seed(4)
    shapes = [(300, 2), (0,), (1,), (500, 3), (7, 100)]
    draws = [standard_normals_like([torch.empty(shape) for shape in shapes]) for _ in range(100)]
    assert all([noise.shape for noise in draw] == [torch.Size(shape) for shape in shapes] for draw in draws)
    flat = torch.stack([torch.cat([noise.flatten() for noise in draw]) for draw in draws])
    assert sorted(sizes) == 100 * [1400] + 100 * [1401]
    assert flat.unique().numel() > 0.99 * flat.numel()
    assert stats.kstest(flat.flatten(), "norm").pvalue > 0.01
    assert stats.kstest(flat.mean(0) * 10, "norm").pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_noise_is_contiguous_and_of_the_dtype(dtype):
    noise = standard_normals_like([torch.empty(400, 500, dtype=dtype).T])[0]
    assert noise.shape == (500, 400) and noise.dtype == dtype and noise.is_contiguous()
