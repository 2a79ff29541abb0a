"""Labels that a posterior gives to unlabelled scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from monai.data import MetaTensor

from dwp_pyro.data.mapped import mapped
from dwp_pyro.data.preprocessing import Example, class_indices
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.inference.predictive import binary_entropy
from dwp_pyro.runtime.progress import each
from dwp_pyro.training.choose_decision import predict_example
from dwp_pyro.training.training_data import TrainingData

__all__ = ["pseudo_label", "with_pseudo_labels"]

_MAX_ENTROPY = 0.5  # nats, of a probability of 0.2 or 0.8


def with_pseudo_labels(
    data: TrainingData, unlabelled: Sequence[Example], posterior: Posterior, device: torch.device
) -> TrainingData:
    """Add unlabelled cases, labeled by a posterior on `device`, to the training cases.

    Training cases are repeated a whole number of times, so that about half of the patches come from them.
    """
    labeled = []
    for example in each(unlabelled, "labeling further scans"):
        labeled.append(mapped(pseudo_label(posterior, example, device)))
    repeats = max(1, round(len(labeled) / len(data.train)))
    return replace(data, train=(*data.train * repeats, *labeled))


def pseudo_label(posterior: Posterior, example: Example, device: torch.device) -> Example:
    """Return an example with the masks of the decision of a posterior on `device` as its label.

    Voxels whose entropy exceeds 0.5 nats in any region are ignored, as voxels labeled "ignore" are, and so are those
    that the decision segments with a probability below 1/2. Components that it removes are background.
    """
    probability = predict_example(posterior, example, posterior.decision.mirror, device)
    masks = posterior.network_config.masks(probability, posterior.decision, None)
    unsure = binary_entropy(torch.from_numpy(probability)).numpy() > _MAX_ENTROPY
    certain = ~(unsure | (masks & (probability < 0.5))).any(0)
    brain_mask = np.where(certain | (example.brain_mask.numpy() != 1), example.brain_mask.numpy(), 2).astype(np.uint8)
    masks &= brain_mask == 1
    label, counted = MetaTensor(torch.from_numpy(masks.astype(np.uint8))), MetaTensor(torch.from_numpy(brain_mask))
    return replace(example, label=label, brain_mask=counted, indices=class_indices(label, counted))
