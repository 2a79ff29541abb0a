"""A small scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dwp_pyro.data.case import Scan

# A permuted and flipped grid with unequal sides.
AFFINE = np.array([[0, -2.0, 0, 30], [0, 0, 3.0, -20], [-2.5, 0, 0, 10], [0, 0, 0, 1]])


@pytest.fixture
def scan() -> Scan:
    rng = np.random.default_rng(0)
    brain_mask = np.zeros((20, 24, 28), bool)
    brain_mask[3:17, 4:21, 2:25] = True
    label = np.zeros(brain_mask.shape, np.int16)
    label[8:12, 9:14, 10:16] = 2
    label[9:11, 10:12, 11:13] = 4
    images = (rng.normal(500, 100, (2, *brain_mask.shape)) * brain_mask).astype(np.float32)
    images[1] *= 7
    return Scan("c", images, brain_mask, label, AFFINE, Path("c.nii"))
