"""Summary of a finished `svi` run: ELBO, null models, and the distance of each block from its prior."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from scipy.stats import linregress
from torch import Tensor
from torch.distributions import kl_divergence

from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.loop import patch_loader
from dwp_pyro.inference.optimization import guide_function
from dwp_pyro.inference.schedule import step_seed
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.training.network_training import TrainingSetup

__all__ = [
    "NULLS",
    "PATCHES",
    "block_summaries",
    "evaluate_elbo",
    "mean_and_error",
    "report_nulls",
    "report_unconverged",
    "summarize",
]

_logger = logging.getLogger(__name__)

PATCHES, NOISES = 64, 2  # patches differ more than weight samples
#: Null model → description of its kernels.
NULLS = {"frozen": "kernels that stay at their start", "prior": "kernels drawn from the prior"}


@torch.no_grad()
def evaluate_elbo(
    model: SegmentationModel, guide: MeanFieldNormal | None, patches: PatchDataset, seed: int, noises: int = NOISES
) -> dict[str, Tensor]:
    """Return the ELBO and its parts at β = 1 on given patches, with noise that depends on the seed alone.

    `noises` is the number of weight samples; without a guide they are drawn from the priors of the sites.

    Returns:
        "elbo", "log_likelihood", "kl" and "log_prior", [noises, patches] each, in nats; each patch stands for all.
    """
    device = next(model.network.parameters()).device
    batches = [[part.to(device) for part in batch] for batch in patch_loader(patches, 1, device)]
    elbo = MeanFieldELBO()
    model.eval()
    values: dict[str, list[Tensor]] = {}
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for noise in range(noises):
            for batch in batches:
                torch.manual_seed(step_seed(seed, noise))  # the same weight sample for all patches
                value = torch.tensor(-elbo.loss(model, guide_function(guide), *batch))
                for name, term in {"elbo": value, **elbo.terms}.items():
                    values.setdefault(name, []).append(term.cpu())
    return {name: torch.stack(each).view(noises, -1) for name, each in values.items()}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values [noises, patches] and its standard error over weight samples and patches.

    That of a two-way random-effects design. It counts differences between cases, although all have as many patches.
    """
    of_noise, of_patch = values.mean(1, keepdim=True), values.mean(0, keepdim=True)
    noises, patches = values.shape
    rest = (values - of_noise - of_patch + values.mean()).square().sum() / ((noises - 1) * (patches - 1))
    variance = of_noise.var() / noises + of_patch.var() / patches - rest / values.numel()  # rest is in both others
    return float(values.mean()), float(variance.clamp_min(0).sqrt())


@torch.no_grad()
def block_summaries(setups: Sequence[TrainingSetup]) -> dict[str, dict[str, float | None]]:
    """Compare posterior and prior in each prior block, over the sites of all members.

    Returns:
        Block → "s_over_prior", the median ratio of posterior to prior standard deviations; "shift_over_prior", the root
        mean square of (m − a) in prior standard deviations; "kl_per_kernel" in nats; "prior_scale", the mean c, for
        N(0, 1) and He the mean standard deviation. None if the prior has no width (log-uniform).
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for setup in setups:
        assert setup.guide is not None
        for site, block in setup.blocks.items():
            # A learned prior's width is relative to the size of its kernels.
            size = setup.guide.unit(site) if "kernel_prior" in setup.prior_modules else torch.ones(())
            for name, value in _site_parts(setup.guide, site, setup.priors[site](), size).items():
                parts.setdefault(block, {}).setdefault(name, []).append(value.flatten())
    summaries: dict[str, dict[str, float | None]] = {}
    for block, values in parts.items():
        joined = {name: torch.cat(each) for name, each in values.items()}
        summaries[block] = {
            "s_over_prior": float(joined["ratio"].median()) if "ratio" in joined else None,
            "shift_over_prior": float(joined["square"].mean().sqrt()) if "square" in joined else None,
            "kl_per_kernel": float(joined["kl"].sum() / joined["kernels"].sum()),
            "prior_scale": float(joined["scale"].mean()) if "scale" in joined else None,
        }
    return summaries


def _site_parts(guide: MeanFieldNormal, site: str, prior: Any, size: Tensor) -> dict[str, Tensor]:
    loc, deviation = guide.posterior(site)
    parts = {
        "kl": kl_divergence(guide.distribution(site), prior),
        "kernels": torch.tensor([float(loc.shape[:2].numel())]),
    }
    base = prior.base_dist
    if isinstance(base, DeepWeightPrior):
        parts["scale"] = torch.as_tensor(base.scale)
        parts["square"] = base.standardize(loc).square()
        widths = base.density.scale_tril.square().sum(-1).sqrt().view(base.event_shape)
        # In the prior's coordinates if the posterior is diagonal there.
        parts["ratio"] = (guide.scale(site) if guide.unit(site).dim() == 2 else deviation / widths) / base.scale
    elif isinstance(base, Normal):
        parts["scale"] = base.scale.flatten()[:1] / size
        parts["square"] = ((loc - base.loc) / base.scale).square()
        parts["ratio"] = deviation / base.scale
    return parts


def summarize(
    parts: Sequence[Mapping[str, Tensor]],
    nulls: Mapping[str, Tensor],
    dice: Sequence[float | None],
    blocks: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the `summary` entry of `run.json`.

    Args:
        parts: Result of `evaluate_elbo` for each member.
        nulls: Null model of the first member → its ELBO of the same patches under the same noise, [noises, patches].
        dice: Dice of each member on the validation cases.
        blocks: Result of `block_summaries`.
    """
    summary: dict[str, Any] = {}
    for name in ("elbo", "log_likelihood", "kl", "log_prior"):
        summary[name], summary[f"{name}_error"] = mean_and_error(torch.stack([each[name] for each in parts]).mean(0))
    for name, elbo in nulls.items():
        summary[f"elbo_{name}"] = float(elbo.mean())
        rise, error = mean_and_error(parts[0]["elbo"] - elbo)
        summary[f"above_{name}"] = {"nats": rise, "error": error}
    summary["members"] = [
        {"dice": value, "elbo": float(each["elbo"].mean())} for value, each in zip(dice, parts, strict=True)
    ]
    summary["blocks"] = dict(blocks)
    return summary


def report_nulls(summary: Mapping[str, Any]) -> None:
    """Warn about each null model whose ELBO the posterior does not exceed by two standard errors."""
    for null, description in NULLS.items():
        above = summary.get(f"above_{null}")
        if above is not None and not above["nats"] > 2 * above["error"]:
            _logger.warning(
                f"ELBO minus that of {description}: {above['nats']:+.0f} ± {above['error']:.0f} nats; under this prior "
                "the evidence of the scans is not seen to outweigh the KL; train for more steps, or with another prior "
                "(how good the masks are, the validation Dice tells)"
            )


def report_unconverged(records: Sequence[Mapping[str, Any]], stage: str, steps: int) -> None:
    """Warn if the last tenth of a stage's steps raised the ELBO by more than two standard errors.

    A line is fitted to the ELBO at β = 1 of the last third; records as from `read_metrics`.
    """
    terms = {"log_likelihood", "kl", "log_prior"}
    points = [
        (record["step"], record["log_likelihood"] - record["kl"] + record["log_prior"])
        for record in records
        if record.get("stage") == stage and terms <= record.keys() and record["step"] > steps * 2 / 3
    ]
    if len(points) < 5:
        return
    fitted = linregress(*zip(*points, strict=True))
    rise, error = fitted.slope * steps / 10, fitted.stderr * steps / 10
    if rise > 2 * error:
        _logger.warning(
            f"{stage}: the last tenth of the steps still raised the ELBO by {rise:.0f} ± {error:.0f} nats; "
            "train for more steps"
        )
