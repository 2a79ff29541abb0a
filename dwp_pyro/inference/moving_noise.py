"""Weight noise that is met by several weights in turn, as an effect handler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from dwp_pyro.distributions.standard_normal import fill_with_standard_normals

__all__ = ["MovingNoise"]

_USES = 8  # of each number
_FEWEST = 65536  # numbers drawn at a time: as many cost less than all that surrounds them


class MovingNoise(Messenger):
    """Draws an eighth of a step's weight noise, and moves the rest on from the steps before, to other weights.

    Enter it around the loss, on a CPU, where drawing a number for every weight takes longer than their divergence. It
    answers the noise of `MeanFieldNormal`: weight i of step t gets number t·r + i of one stream of standard normals,
    where r is an eighth of the weights, or 65,536. So the noise of a step has the distribution it would have if drawn
    anew, and no weight gets the same number twice. What is lost is that a step's noise is independent of the
    parameters: weight i + r had the number of weight i a step before, and was moved by it, so that the gradient by
    log s_i has a bias of the order of a learning rate times the curvature between the two; and the mean over steps and
    weights together has the error of an eighth of the weights. (Salimans et al. 2017, section 2.1, go farther, and take
    all noise from one table.)

    All noise is drawn at each step for up to 65,536 weights, and on a GPU.

    Args:
        seed: from which, with the step, all follows.
        step: that comes next; each call of the guide is one.

    Raises:
        ValueError: if a step has not as many weights as the first, or weights of another dtype.
    """

    def __init__(self, seed: int, step: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.step = step
        self._stream = torch.empty(0)
        self._weights = self._end = 0

    def _pyro_noise(self, msg: Any) -> None:
        (tensors,) = msg["args"]
        if tensors[0].device.type != "cpu":
            return
        sizes = [tensor.numel() for tensor in tensors]
        noise = self._next(sum(sizes), tensors[0].dtype).split(sizes)
        msg["value"] = [part.view(tensor.shape) for part, tensor in zip(noise, tensors, strict=True)]
        msg["done"] = True

    def _next(self, weights: int, dtype: torch.dtype) -> Tensor:
        length = min(weights, max(math.ceil(weights / _USES), _FEWEST))
        blocks = math.ceil(weights / length)
        if not len(self._stream):
            self._weights = weights
            self._stream = torch.empty(2 * blocks * length, dtype=dtype)
            for block in range(blocks - 1):
                self._append(length, self.step + block)
        if weights != self._weights or dtype != self._stream.dtype:
            raise ValueError(f"the noise of {self._weights} weights cannot go on for others")
        if self._end + length > len(self._stream):
            kept = self._stream[self._end - (blocks - 1) * length : self._end]
            self._stream[: len(kept)] = kept  # from the second half to the first
            self._end = len(kept)
        self._append(length, self.step + blocks - 1)
        self.step += 1
        start = self._end - blocks * length
        return self._stream[start : start + weights]

    def _append(self, length: int, block: int) -> None:
        place = self._stream[self._end : self._end + length]
        seed = int(np.random.default_rng([self.seed, block, 3]).integers(2**32))
        fill_with_standard_normals([place], torch.Generator().manual_seed(seed))
        self._end += length
