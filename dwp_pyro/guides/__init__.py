"""Guides: approximate posteriors over kernels."""
