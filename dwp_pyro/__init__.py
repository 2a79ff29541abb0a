"""Bayesian knowledge transfer for 3D medical segmentation: learned priors over convolution kernels, in Pyro.

The public API; each name is loaded when it is first used, so that `import dwp_pyro` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwp_pyro.config import FinetuneConfig as FinetuneConfig
    from dwp_pyro.config import FitPriorConfig as FitPriorConfig
    from dwp_pyro.config import PredictConfig as PredictConfig
    from dwp_pyro.config import RunOptions as RunOptions
    from dwp_pyro.config import SviConfig as SviConfig
    from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior as DeepWeightPrior
    from dwp_pyro.distributions.kernel_prior import KernelPrior as KernelPrior
    from dwp_pyro.distributions.kernel_vae import KernelVAE as KernelVAE
    from dwp_pyro.distributions.log_uniform import LogUniform as LogUniform
    from dwp_pyro.guides.mean_field import MeanFieldNormal as MeanFieldNormal
    from dwp_pyro.inference.local_reparameterization import LocalReparameterization as LocalReparameterization
    from dwp_pyro.models.bayesian import bayesianize as bayesianize
    from dwp_pyro.models.segmentation import SegmentationModel as SegmentationModel
    from dwp_pyro.models.unet import ResidualUNet3d as ResidualUNet3d
    from dwp_pyro.pipeline.evaluate import evaluate as evaluate
    from dwp_pyro.pipeline.finetune import finetune as finetune
    from dwp_pyro.pipeline.fit_prior import fit_prior as fit_prior
    from dwp_pyro.pipeline.predict import predict as predict
    from dwp_pyro.pipeline.svi import svi as svi

_MODULES = {
    "DeepWeightPrior": "distributions.deep_weight_prior",
    "FinetuneConfig": "config",
    "FitPriorConfig": "config",
    "KernelPrior": "distributions.kernel_prior",
    "KernelVAE": "distributions.kernel_vae",
    "LocalReparameterization": "inference.local_reparameterization",
    "LogUniform": "distributions.log_uniform",
    "MeanFieldNormal": "guides.mean_field",
    "PredictConfig": "config",
    "ResidualUNet3d": "models.unet",
    "RunOptions": "config",
    "SegmentationModel": "models.segmentation",
    "SviConfig": "config",
    "bayesianize": "models.bayesian",
    "evaluate": "pipeline.evaluate",
    "finetune": "pipeline.finetune",
    "fit_prior": "pipeline.fit_prior",
    "predict": "pipeline.predict",
    "svi": "pipeline.svi",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dwp_pyro' has no attribute '{name}'")
    return getattr(import_module(f"dwp_pyro.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
