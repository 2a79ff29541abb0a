"""Guides: approximate posteriors over kernels."""

from dwp_pyro.guides.mean_field import MeanFieldNormal

__all__ = ["MeanFieldNormal"]
