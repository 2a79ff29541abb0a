"""Networks, likelihoods and the Pyro program of a segmentation."""

from dwp_pyro.models.bayesianize import BayesianConv, SitePrior, bayesianize
from dwp_pyro.models.likelihoods import (
    ACTIVATIONS,
    LIKELIHOODS,
    categorical,
    choose_activation,
    dice_ce,
    region_masks,
    region_probability,
)
from dwp_pyro.models.registry import NETWORKS, NetworkKind, build_network
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import ResidualUNet3d

__all__ = [
    "ACTIVATIONS",
    "LIKELIHOODS",
    "NETWORKS",
    "BayesianConv",
    "NetworkKind",
    "ResidualUNet3d",
    "SegmentationModel",
    "SitePrior",
    "bayesianize",
    "build_network",
    "categorical",
    "choose_activation",
    "dice_ce",
    "region_masks",
    "region_probability",
]
