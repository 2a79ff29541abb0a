"""Names of priors and of their families, and a limit, free of torch, so that the command line starts fast."""

from __future__ import annotations

__all__ = ["FAMILIES", "LEARNED", "MAX_UNITS", "PRIORS"]

#: Families of kernel distributions, simplest first: what `fit-prior` fits. The classes are `densities.DENSITIES`.
FAMILIES = ("gaussian", "mixture", "flow", "dwp")

#: Priors that need a fitted `KernelPrior`; "isotropic" uses the scale of each block alone.
LEARNED = (*FAMILIES, "isotropic")

PRIORS = ("dwp", "gaussian", "mixture", "flow", "isotropic", "normal", "he", "log-uniform")

#: Limit on the units of all layers of a density, against files that would exhaust memory; far above real priors.
MAX_UNITS = 8192
