"""Turns the kernels of a network into sample sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution

from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.distributions.priors import prior_at
from dwp_pyro.models.blocks import CONVOLUTIONS, kernel_sites, prior_blocks

__all__ = ["BayesianConv", "SitePrior", "bayesianize"]


def _convolve(convolution: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolution(input, weight, bias)


_convolution = effectful(_convolve, type="convolution")


class BayesianConv(PyroModule):
    """Mixed into a convolution: its `weight` is a sample site, and the convolution itself an effect.

    The effect has the type "convolution" and carries the site's name, so that a handler (local
    reparameterisation) can answer it in its own way; without one it is the plain convolution.
    """

    #: The class of the convolution that it was.
    plain: type[nn.Module]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = super()._conv_forward  # type: ignore[misc]
        site = self._pyro_get_fullname("weight")
        output: Tensor = _convolution(convolve, input, weight, bias, infer={"site": site})
        return output

    def __reduce__(self) -> Any:
        # Pyro's own would rebuild a copy without this class, and its handlers would fall silent.
        return _empty, (self.plain,), self.__dict__.copy()


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _bayesian(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a convolution of this class with a kernel site."""
    if kind not in _classes:
        # Pyro's own classes cannot be pickled.
        plain: Any = next(base for base in kind.__mro__ if not issubclass(base, PyroModule))
        _classes[kind] = type(f"Bayesian{plain.__name__}", (BayesianConv, PyroModule[plain]), {"plain": plain})
    return _classes[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = _bayesian(kind)
    return made.__new__(made)


def _of_module(prior: SitePrior) -> TorchDistribution | Callable[[nn.Module], TorchDistribution]:
    """A prior as `PyroSample` takes it."""
    return prior if isinstance(prior, Distribution) else lambda module: prior()


def _at_every_site(network: nn.Module, prior: KernelPrior | str) -> dict[str, TorchDistribution]:
    sites = kernel_sites(network)
    if isinstance(prior, str):
        return {site: prior_at(prior, site, weight) for site, weight in sites.items()}
    prior = prior.at_sites(prior_blocks(network))
    return {site: prior_at(prior.family, site, weight, prior) for site, weight in sites.items()}


#: A prior, or a function that gives it anew at each pass, where it is learned.
SitePrior = TorchDistribution | Callable[[], TorchDistribution]


def bayesianize(network: nn.Module, prior: Mapping[str, SitePrior] | KernelPrior | str) -> dict[str, Tensor]:
    """Make sample sites of a network's kernels, in place.

    The network becomes a `PyroModule`; each named weight is no longer a parameter but is sampled
    from its prior at a site that has the parameter's own name ("down1.conv1.weight"), also when a plain
    module holds the network (a `PyroModule` that holds it puts its own name before, as everywhere in
    Pyro). All else stays as it was: deterministic parameters.

    Args:
        network: any module with convolutions; it is the root of the sites' names.
        prior: a learned prior, whose blocks are given to all spatial kernels by `prior_blocks` (where it was fitted
            to sites of other names); "normal" or "log-uniform" for all of them; or, of the kernels that are
            named, site → distribution over the whole weight [out, in, k₁, …, k_d], or a function that returns it,
            called at each pass.

    Returns:
        The weights that were there, site → tensor: a guide's natural first means.

    Raises:
        ValueError: if a name is not the weight of a convolution, or a prior has another event shape.
        PriorError: if a learned prior does not fit the network's kernels.

    Example:
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
        # Pyro names a module that stands in two places (of DynUNet, say) after the last, PyTorch after the first.
        module._pyro_name = path
    for site, module in convolutions.items():
        # As to_pyro_module_ does: the class of the module changes, the module stays.
        module.__class__ = _bayesian(kinds[site])
        module.weight = PyroSample(_of_module(priors[site]))
    return weights
