"""The generative program: a network, a likelihood, a plate over cases."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pyro
import torch
from torch import Tensor, nn

from dwp_pyro.models.likelihoods import ACTIVATIONS, LIKELIHOODS

__all__ = ["SegmentationModel", "in_precision"]


def in_precision(name: str, device: torch.device) -> AbstractContextManager[None]:
    """A context for a network's forward pass: "bf16" for autocast to bfloat16; "float32" changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


class SegmentationModel(nn.Module):
    """p(y, W | x) = p(W) Π_cases p(y|x, W), as a Pyro program.

    A plate over cases scales a minibatch of B up to N. A network without sample sites makes a model without
    latent variables, whose ELBO is the log-likelihood: the deterministic arms.

    Args:
        network: images [B, channels, X, Y, Z] → logits [B, 1 + R, X, Y, Z], background first; see `bayesianize`.
        likelihood: a name among `LIKELIHOODS`.
        num_cases: N.
        kernel_prior: the learned prior of the network's sites, where they have one: it moves and saves with
            the model, and what of it is not frozen (the reverse model r(z|w), say) is trained with the guide.
        pull: α of the factor exp(−α/2 Σ (θ − θ₀)²) over the network's parameters θ, θ₀ their values now
            (L2-SP; Li et al. 2018, eq. 3); 0 for none.
        precision: "float32", or "bf16" for the network in bfloat16 (autocast); weights, prior and likelihood stay.
        activation: "softmax" for regions that exclude each other, "sigmoid" for those that may overlap.
        dice_weight: Share of the Dice loss in "dice-ce", from 0 to 1.

    Raises:
        ValueError: if likelihood or activation have no such name.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: str,
        num_cases: int,
        kernel_prior: nn.Module | None = None,
        pull: float = 0.0,
        precision: str = "float32",
        activation: str = "sigmoid",
        dice_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS or activation not in ACTIVATIONS:
            raise ValueError(f"no likelihood '{likelihood}' with activation '{activation}'")
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
        self.activation = activation
        self.log_likelihood = partial(
            LIKELIHOODS[likelihood],
            activation=activation,
            **({"dice_weight": dice_weight} if likelihood == "dice-ce" else {}),
        )
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
        log_likelihood = self.log_likelihood(logits, label, brain, brain_voxels)
        with pyro.plate("cases", self.num_cases, subsample=torch.arange(len(image), device=image.device)):
            pyro.factor("label", log_likelihood)
        if self.pull:
            pairs = zip(self.network.parameters(), self.start, strict=True)
            distance = torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
            pyro.factor("pull", -0.5 * self.pull * distance)
        return logits
