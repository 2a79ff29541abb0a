"""Conversion of a network's kernels to sample sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution

from dwp_pyro.priors.blocks import CONVOLUTIONS, kernel_sites, prior_blocks
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.make_prior import make_prior

__all__ = ["BayesianConv", "SitePrior", "bayesianize"]


@effectful(type="convolution")
def _convolution(convolve: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolve(input, weight, bias)


class BayesianConv(PyroModule):
    """Mixin of a convolution whose `weight` is a sample site.

    The convolution is an effect of type "convolution" with the site's name, which a handler (local reparameterization)
    can replace.
    """

    #: Class of the original convolution.
    plain: type[nn.Module]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = super()._conv_forward  # type: ignore[misc]
        site = self._pyro_get_fullname("weight")
        output: Tensor = _convolution(convolve, input, weight, bias, infer={"site": site})
        return output

    def __reduce__(self) -> Any:
        # Pyro's `__reduce__` would restore a copy without this class, which handlers do not reach.
        return _empty, (self.plain,), self.__dict__.copy()


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _bayesian(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a convolution class that has a kernel site."""
    if kind not in _classes:
        # Classes that Pyro generates cannot be pickled.
        plain: Any = next(base for base in kind.__mro__ if not issubclass(base, PyroModule))
        _classes[kind] = type(f"Bayesian{plain.__name__}", (BayesianConv, PyroModule[plain]), {"plain": plain})
    return _classes[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    bayesian = _bayesian(kind)
    return bayesian.__new__(bayesian)


def _at_every_site(network: nn.Module, prior: KernelPrior | str) -> dict[str, TorchDistribution]:
    learned = None if isinstance(prior, str) else prior.assign_sites(prior_blocks(network))
    name = prior if isinstance(prior, str) else prior.family
    return {site: make_prior(name, site, weight, learned) for site, weight in kernel_sites(network).items()}


#: A prior, or for a learned one a function that returns it, called at each forward pass.
SitePrior = TorchDistribution | Callable[[], TorchDistribution]


def bayesianize(network: nn.Module, prior: Mapping[str, SitePrior] | KernelPrior | str) -> dict[str, Tensor]:
    """Convert kernels of a network to sample sites, in place.

    The network becomes a `PyroModule`. A converted weight is no longer a parameter: it is sampled from its prior at a
    site of the parameter's name ("down1.conv1.weight"). An enclosing plain module does not change that name; an
    enclosing `PyroModule` adds its prefix, as usual in Pyro. Other parameters stay deterministic.

    Args:
        network: Module with convolutions; the root of the sites' names.
        prior: Prior of all spatial kernels: a learned one (its blocks are assigned by `prior_blocks` if it was fitted
            to sites of other names), "normal", "he" or "log-uniform". Or a mapping for the named kernels alone: site →
            distribution over the whole weight [out, in, k₁, …, k_d], or a function that returns it, called at each
            forward pass.

    Returns:
        The previous weights, site → tensor; suitable as initial means of a guide.

    Raises:
        ValueError: If a name is not the weight of a convolution, or a prior has another event shape.
        PriorError: If a learned prior does not fit the network's kernels.

    Examples:
        >>> from monai.networks.nets import SegResNet
        >>> from dwp_pyro import bayesianize
        >>> kernels = bayesianize(SegResNet(init_filters=8), "normal")
        >>> len(kernels), tuple(kernels["convInit.conv.weight"].shape)
        (28, (8, 1, 3, 3, 3))
    """
    priors: Mapping[str, SitePrior] = prior if isinstance(prior, Mapping) else _at_every_site(network, prior)
    modules = dict(network.named_modules())
    convolutions: dict[str, Any] = {}
    for site, given in priors.items():
        at_site = given if isinstance(given, Distribution) else given()
        path, _, leaf = site.rpartition(".")
        module: Any = modules.get(path)
        if leaf != "weight" or not isinstance(module, CONVOLUTIONS) or isinstance(module, BayesianConv):
            raise ValueError(f"'{site}' is not the weight of a convolution of this network")
        weight = module.weight
        if at_site.event_shape != weight.shape or at_site.batch_shape:
            raise ValueError(f"'{site}' has the shape {tuple(weight.shape)}, its prior {at_site.shape()}")
        convolutions[site] = module
    weights = {site: module.weight.detach().clone() for site, module in convolutions.items()}
    kinds = {site: type(module) for site, module in convolutions.items()}
    to_pyro_module_(network)
    for path, module in modules.items():
        # Pyro names a module that occurs twice (as in DynUNet) after its last path, PyTorch after its first.
        module._pyro_name = path
    for site, module in convolutions.items():
        # Replace the class in place, as `to_pyro_module_` does.
        module.__class__ = _bayesian(kinds[site])
        given = priors[site]
        module.weight = PyroSample(given if isinstance(given, Distribution) else lambda _, given=given: given())
    return weights
