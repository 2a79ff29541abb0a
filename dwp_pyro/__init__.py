"""Bayesian knowledge transfer for 3D medical segmentation: learned priors over convolution kernels, in Pyro.

This module is the public API. Each name is imported at first use, to keep `import dwp_pyro` fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwp_pyro.config.base import RunOptions as RunOptions
    from dwp_pyro.config.prediction import PredictConfig as PredictConfig
    from dwp_pyro.config.training import FinetuneConfig as FinetuneConfig
    from dwp_pyro.config.training import FitPriorConfig as FitPriorConfig
    from dwp_pyro.config.training import SviConfig as SviConfig
    from dwp_pyro.densities.vae import KernelVAE as KernelVAE
    from dwp_pyro.evaluation.evaluate import evaluate as evaluate
    from dwp_pyro.guides.mean_field import MeanFieldNormal as MeanFieldNormal
    from dwp_pyro.inference.local_reparameterization import LocalReparameterization as LocalReparameterization
    from dwp_pyro.models.bayesianize import bayesianize as bayesianize
    from dwp_pyro.models.segmentation import SegmentationModel as SegmentationModel
    from dwp_pyro.models.unet import ResidualUNet3d as ResidualUNet3d
    from dwp_pyro.prediction.predict import predict as predict
    from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior as DeepWeightPrior
    from dwp_pyro.priors.kernel_prior import KernelPrior as KernelPrior
    from dwp_pyro.priors.log_uniform import LogUniform as LogUniform
    from dwp_pyro.runtime.workers import Workers as Workers
    from dwp_pyro.training.finetune import finetune as finetune
    from dwp_pyro.training.fit_prior import fit_prior as fit_prior
    from dwp_pyro.training.svi import svi as svi

_MODULES = {
    "DeepWeightPrior": "priors.deep_weight_prior",
    "FinetuneConfig": "config.training",
    "FitPriorConfig": "config.training",
    "KernelPrior": "priors.kernel_prior",
    "KernelVAE": "densities.vae",
    "LocalReparameterization": "inference.local_reparameterization",
    "LogUniform": "priors.log_uniform",
    "MeanFieldNormal": "guides.mean_field",
    "PredictConfig": "config.prediction",
    "ResidualUNet3d": "models.unet",
    "RunOptions": "config.base",
    "SegmentationModel": "models.segmentation",
    "SviConfig": "config.training",
    "Workers": "runtime.workers",
    "bayesianize": "models.bayesianize",
    "evaluate": "evaluation.evaluate",
    "finetune": "training.finetune",
    "fit_prior": "training.fit_prior",
    "predict": "prediction.predict",
    "svi": "training.svi",
}

__all__ = list(_MODULES)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dwp_pyro' has no attribute '{name}'")
    return getattr(import_module(f"dwp_pyro.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
