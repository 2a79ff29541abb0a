"""The generative program: a network, a likelihood, a plate over cases."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pyro
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LIKELIHOODS", "SegmentationModel", "categorical", "dice_ce", "in_precision", "region_logits"]


def region_logits(logits: Tensor) -> Tensor:
    """[B, 1 + R, X, Y, Z] → [B, R, X, Y, Z]: each region's logit is above that of the background, channel 0.

    Regions may overlap: each is a sigmoid of its own. One region is the softmax of two classes.
    """
    return logits[:, 1:] - logits[:, :1]


def categorical(logits: Tensor, label: Tensor, brain: Tensor, brain_voxels: Tensor) -> Tensor:
    """Σ over the brain voxels of a case, and over the regions, of log p(y|x), in nats; [B].

    On a patch it is the mean over the patch's brain voxels times the case's `brain_voxels`, which on
    a whole volume is the sum itself.

    Args:
        logits: [B, 1 + R, X, Y, Z]; see `region_logits`.
        label: [B, R, X, Y, Z], 1 in the region and 0 outside.
        brain: [B, 1, X, Y, Z], 1 where a voxel counts and 0 elsewhere.
        brain_voxels: [B], brain voxels of the whole case.
    """
    return -_mean_cross_entropy(region_logits(logits), label, brain).sum(1) * brain_voxels


def dice_ce(logits: Tensor, label: Tensor, brain: Tensor, brain_voxels: Tensor) -> Tensor:
    """−V·(0.99·Dice loss + 0.01·mean cross-entropy) of a case, V its brain voxels; [B].

    The loss of Kuzina et al. 2019 read as a generalised (Gibbs) likelihood; arguments as for
    `categorical`. The Dice loss is 1 − soft Dice over brain voxels; both are means over the regions.
    """
    chosen = region_logits(logits)
    probability = chosen.sigmoid() * brain
    label = label.to(probability.dtype)
    voxels = (2, 3, 4)
    overlap = (probability * label).sum(voxels)
    total = probability.sum(voxels) + (label * brain).sum(voxels)
    # +1 voxel on both sides: a case without foreground then has the Dice 1 for an empty prediction.
    dice = (2 * overlap + 1) / (total + 1)
    cross_entropy = _mean_cross_entropy(chosen, label, brain)
    return -brain_voxels * (0.99 * (1 - dice) + 0.01 * cross_entropy).mean(1)


def _mean_cross_entropy(logits: Tensor, label: Tensor, brain: Tensor) -> Tensor:
    """Of each region over the brain voxels, [B, R]."""
    loss = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none") * brain
    return loss.flatten(2).sum(2) / brain.flatten(1).sum(1, keepdim=True).clamp_min(1)


#: Name → log-likelihood of each case of a batch.
LIKELIHOODS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "dice-ce": dice_ce,
    "categorical": categorical,
}


def in_precision(name: str, device: torch.device) -> AbstractContextManager[None]:
    """A context for a network's forward pass: "bf16" for autocast to bfloat16; "float32" changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


class SegmentationModel(nn.Module):
    """p(y, W | x) = p(W) Π_cases p(y|x, W), as a Pyro program.

    A plate over cases scales a minibatch of B up to N. A network without sample sites makes a model without
    latent variables, whose ELBO is the log-likelihood: the deterministic arms.

    Args:
        network: images [B, channels, X, Y, Z] → logits [B, 1 + R, X, Y, Z]; see `bayesianize` and `region_logits`.
        likelihood: a name among `LIKELIHOODS`.
        num_cases: N.
        kernel_prior: the learned prior of the network's sites, where they have one: it moves and saves with
            the model, and what of it is not frozen (the reverse model r(z|w), say) is trained with the guide.
        pull: α of the factor exp(−α/2 Σ (θ − θ₀)²) over the network's parameters θ, θ₀ their values now
            (L2-SP; Li et al. 2018, eq. 3); 0 for none.
        precision: "float32", or "bf16" for the network in bfloat16 (autocast); weights, prior and likelihood stay.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: str,
        num_cases: int,
        kernel_prior: nn.Module | None = None,
        pull: float = 0.0,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.kernel_prior = kernel_prior
        self.pull = pull
        self.precision = precision
        # A ParameterList makes trainable what is no parameter yet.
        self.start = nn.ParameterList(
            nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for parameter in (network.parameters() if pull else ())
        )
        self.network = network
        self.likelihood = likelihood
        self.num_cases = num_cases

    def forward(self, image: Tensor, label: Tensor, brain: Tensor, brain_voxels: Tensor) -> Tensor:
        """Returns logits; shapes as for `categorical`, image [B, channels, X, Y, Z]."""
        for part, module in self.named_children():
            if isinstance(module, pyro.nn.PyroModule):  # which announces its parameters itself
                continue
            for name, parameter in module.named_parameters(part):
                if parameter.requires_grad:
                    pyro.param(name, parameter)
        with in_precision(self.precision, image.device):
            logits: Tensor = self.network(image)
        if self.precision == "bf16":  # the likelihood sums over many voxels
            logits = logits.float()
        log_likelihood = LIKELIHOODS[self.likelihood](logits, label, brain, brain_voxels)
        with pyro.plate("cases", self.num_cases, subsample=torch.arange(len(image), device=image.device)):
            pyro.factor("label", log_likelihood)
        if self.pull:
            pairs = zip(self.network.parameters(), self.start, strict=True)
            distance = torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
            pyro.factor("pull", -0.5 * self.pull * distance)
        return logits
