"""The Pyro program of a segmentation: a network, a likelihood and a plate over cases."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType

import pyro
import torch
from torch import Tensor, nn

from dwp_pyro.models.likelihoods import ACTIVATIONS, LIKELIHOODS
from dwp_pyro.priors.prior_scales import PriorScales

__all__ = ["LOG_PRIOR", "SegmentationModel", "autocast"]

#: Name of the factor for the log-prior of deterministic weights and of prior scales.
LOG_PRIOR = "log_prior"


def autocast(name: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context for a network's forward pass: autocast to bfloat16 for "bf16", else a null context."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


class SegmentationModel(nn.Module):
    """p(y, W | x) = p(W) Π_cases p(y|x, W)^λ, as a Pyro program.

    A plate over cases scales a minibatch of B cases to N. Without sample sites the ELBO is the log-likelihood, as for
    the deterministic methods.

    Neighboring voxels are not independent observations. A segmentation counts as λ observations whatever its size: the
    posterior is tempered by λ over the number of voxels.

    Args:
        network: Images [B, channels, X, Y, Z] → logits [B, 1 + R, X, Y, Z], background first; see `bayesianize`.
        likelihood: One of `LIKELIHOODS`.
        num_cases: Number of training cases N.
        evidence: Number of independent observations λ that the segmentation of a case counts as.
        prior_modules: Modules of the priors of the network's sites (a `KernelPrior`, `PriorScales`): they move and
            save with the model; their parameters that require gradients are trained with the guide.
        l2_sp: Precision α of the factor exp(−α/2 Σ (θ − θ₀)²) over the network's parameters θ with present values θ₀
            (L2-SP; Li et al. 2018, eq. 3): the MAP of θ ~ N(θ₀, 1/α). 0 for none.
        precision: "float32", or "bf16" for a network in bfloat16 (autocast); weights, prior and likelihood stay
            float32.
        activation: "softmax" for mutually exclusive regions, "sigmoid" for regions that may overlap.
        dice_weight: Weight of the Dice loss in "dice-ce", from 0 to 1.

    Raises:
        ValueError: If the likelihood or the activation is unknown.

    Examples:
        >>> import torch
        >>> from dwp_pyro import MeanFieldNormal, ResidualUNet3d, SegmentationModel, bayesianize
        >>> network = ResidualUNet3d(1, 2, widths=(2, 3, 4, 5))
        >>> guide = MeanFieldNormal(bayesianize(network, "normal"))
        >>> model = SegmentationModel(network, "dice-ce", num_cases=5, evidence=50_000)
        >>> image, label = torch.zeros(1, 1, 16, 16, 16), torch.ones(1, 1, 16, 16, 16)
        >>> tuple(model(image, label, torch.ones_like(label)).shape)
        (1, 2, 16, 16, 16)
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: str,
        num_cases: int,
        evidence: float = 1.0,
        prior_modules: Mapping[str, nn.Module] = MappingProxyType({}),
        l2_sp: float = 0.0,
        precision: str = "float32",
        activation: str = "sigmoid",
        dice_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS or activation not in ACTIVATIONS:
            raise ValueError(f"no likelihood '{likelihood}' with activation '{activation}'")
        self.prior_modules = nn.ModuleDict(prior_modules)
        self.evidence = evidence
        self.l2_sp = l2_sp
        self.precision = precision
        # ParameterList would convert plain tensors to trainable parameters.
        self.start = nn.ParameterList(
            nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for parameter in (network.parameters() if l2_sp else ())
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

    def forward(self, image: Tensor, label: Tensor, brain_mask: Tensor) -> Tensor:
        """Score a minibatch and return its logits; shapes as for `categorical`, image [B, channels, X, Y, Z]."""
        for child, module in self.named_children():
            if isinstance(module, pyro.nn.PyroModule):  # registers its own parameters
                continue
            for name, parameter in module.named_parameters(child):
                if parameter.requires_grad:
                    pyro.param(name, parameter)
        with autocast(self.precision, image.device):
            logits: Tensor = self.network(image)
        if self.precision == "bf16":
            logits = logits.float()  # the likelihood sums over many voxels
        log_likelihood = self.evidence * self.log_likelihood(logits, label, brain_mask)
        with pyro.plate("cases", self.num_cases, subsample=torch.arange(len(image), device=image.device)):
            pyro.factor("label", log_likelihood)
        if terms := self._log_prior():
            pyro.factor(LOG_PRIOR, torch.stack(terms).sum())
        return logits

    def _log_prior(self) -> list[Tensor]:
        """Return the log-prior terms of the deterministic weights and of the prior scales."""
        terms = [module.log_prob() for module in self.prior_modules.values() if isinstance(module, PriorScales)]
        if self.l2_sp:
            pairs = zip(self.network.parameters(), self.start, strict=True)
            terms += [-0.5 * self.l2_sp * (now - then).square().sum() for now, then in pairs]
        return terms
