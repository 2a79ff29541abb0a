"""Priors over the convolution kernels of a network."""
