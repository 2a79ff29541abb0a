"""The generative program: a network, a likelihood, a plate over cases."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType

import pyro
import torch
from torch import Tensor, nn

from dwp_pyro.distributions.prior_scales import PriorScales
from dwp_pyro.models.likelihoods import ACTIVATIONS, LIKELIHOODS

__all__ = ["LOG_PRIOR", "SegmentationModel", "in_precision"]

#: Name of the factor by which a model adds the log-prior of weights that are no sites.
LOG_PRIOR = "log_prior"


def in_precision(name: str, device: torch.device) -> AbstractContextManager[None]:
    """A context for a network's forward pass: "bf16" for autocast to bfloat16; "float32" changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext()


class SegmentationModel(nn.Module):
    """p(y, W | x) = p(W) Π_cases p(y|x, W)^λ, as a Pyro program.

    A plate over cases scales a minibatch of B up to N. A network without sample sites makes a model without
    latent variables, whose ELBO is the log-likelihood: the deterministic arms.

    Neighboring voxels are not independent observations. A segmentation counts as λ of them, whatever its voxels: the
    posterior is tempered by λ over their number.

    Args:
        network: Images [B, channels, X, Y, Z] → logits [B, 1 + R, X, Y, Z], background first; see `bayesianize`.
        likelihood: One of `LIKELIHOODS`.
        num_cases: N.
        evidence: λ, the independent observations that the segmentation of a case counts as.
        prior_modules: Modules that the priors of the network's sites belong to (a `KernelPrior`, `PriorScales`): they
            move and save with the model, and what of them requires a gradient is trained with the guide.
        l2_sp: α of the factor exp(−α/2 Σ (θ − θ₀)²) over the network's parameters θ, θ₀ their values now
            (L2-SP; Li et al. 2018, eq. 3): the MAP of θ ~ N(θ₀, 1/α). 0 for none.
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
        # A ParameterList makes trainable what is no parameter yet.
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

    def forward(self, image: Tensor, label: Tensor, brain: Tensor) -> Tensor:
        """Returns logits; shapes as for `categorical`, image [B, channels, X, Y, Z]."""
        for child, module in self.named_children():
            if isinstance(module, pyro.nn.PyroModule):  # which registers its parameters itself
                continue
            for name, parameter in module.named_parameters(child):
                if parameter.requires_grad:
                    pyro.param(name, parameter)
        with in_precision(self.precision, image.device):
            logits: Tensor = self.network(image)
        if self.precision == "bf16":  # the likelihood sums over many voxels
            logits = logits.float()
        log_likelihood = self.evidence * self.log_likelihood(logits, label, brain)
        with pyro.plate("cases", self.num_cases, subsample=torch.arange(len(image), device=image.device)):
            pyro.factor("label", log_likelihood)
        if terms := self._log_prior():
            pyro.factor(LOG_PRIOR, torch.stack(terms).sum())
        return logits

    def _log_prior(self) -> list[Tensor]:
        """Log-prior terms of the deterministic weights and of the scales of priors."""
        terms = [module.log_prob() for module in self.prior_modules.values() if isinstance(module, PriorScales)]
        if self.l2_sp:
            pairs = zip(self.network.parameters(), self.start, strict=True)
            terms += [-0.5 * self.l2_sp * (now - then).square().sum() for now, then in pairs]
        return terms
