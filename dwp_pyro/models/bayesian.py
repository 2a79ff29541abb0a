"""Turns the kernels of a network into sample sites."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any

from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

__all__ = ["BayesianConv", "bayesianize"]


class BayesianConv(PyroModule):
    """Mixed into a convolution: its `weight` is a sample site, and the convolution itself an effect.

    The effect has the type "convolution" and carries the site's name, so that a handler (local
    reparameterisation) can answer it in its own way; without one it is the plain convolution.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = super()._conv_forward  # type: ignore[misc]
        output: Tensor = effectful(convolve, type="convolution")(
            input, weight, bias, infer={"site": self._pyro_get_fullname("weight")}
        )
        return output

    def __reduce__(self) -> Any:
        # Pyro's own would rebuild a copy without this class, and its handlers would fall silent.
        return copyreg.__newobj__, (type(self),), self.__dict__.copy()  # type: ignore[attr-defined]


class BayesianConv1d(BayesianConv, PyroModule[nn.Conv1d]):  # type: ignore[type-arg]
    """A one-dimensional convolution with a kernel site."""


class BayesianConv2d(BayesianConv, PyroModule[nn.Conv2d]):  # type: ignore[type-arg]
    """A two-dimensional convolution with a kernel site."""


class BayesianConv3d(BayesianConv, PyroModule[nn.Conv3d]):  # type: ignore[type-arg]
    """A three-dimensional convolution with a kernel site."""


_BAYESIAN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BayesianConv1d,
    nn.Conv2d: BayesianConv2d,
    nn.Conv3d: BayesianConv3d,
}


def bayesianize(network: nn.Module, priors: Mapping[str, TorchDistribution]) -> dict[str, Tensor]:
    """Make sample sites of a network's kernels, in place.

    The network becomes a `PyroModule`; each named weight is no longer a parameter but is sampled
    from its prior at a site that has the parameter's own name ("down1.conv1.weight"), also when a plain
    module holds the network (a `PyroModule` that holds it puts its own name before, as everywhere in
    Pyro). All else stays as it was: deterministic parameters.

    Args:
        network: any module with convolutions; it is the root of the sites' names.
        priors: site → distribution over the whole weight [out, in, k₁, …, k_d].

    Returns:
        The weights that were there, site → tensor: a guide's natural first means.

    Raises:
        ValueError: if a name is not the weight of a convolution, or a prior has another event shape.
    """
    modules = dict(network.named_modules())
    convolutions: dict[str, Any] = {}
    for site, prior in priors.items():
        path, _, leaf = site.rpartition(".")
        module: Any = modules.get(path)
        if leaf != "weight" or type(module) not in _BAYESIAN:
            raise ValueError(f"'{site}' is not the weight of a convolution of this network")
        weight = module.weight
        if prior.event_shape != weight.shape or prior.batch_shape:
            raise ValueError(f"'{site}' has the shape {tuple(weight.shape)}, its prior {prior.shape()}")
        convolutions[site] = module
    weights = {site: module.weight.detach().clone() for site, module in convolutions.items()}
    kinds = {site: type(module) for site, module in convolutions.items()}
    to_pyro_module_(network)
    for site, module in convolutions.items():
        # As to_pyro_module_ does: the class of the module changes, the module stays.
        module.__class__ = _BAYESIAN[kinds[site]]
        module.weight = PyroSample(priors[site])
    return weights
