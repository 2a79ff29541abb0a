"""What a finished `svi` says of its posterior: ELBO, null models, and how far each block went from its prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from scipy.stats import linregress
from torch import Tensor
from torch.distributions import kl_divergence

from dwp_pyro.data.transforms import Patches
from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.svi import patch_loader, step_seed
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.pipeline.train_network import Program
from dwp_pyro.progress import message

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

PATCHES, NOISES = 32, 8
#: Null → what its kernels are.
NULLS = {"frozen": "kernels that stay at their start", "prior": "kernels drawn from the prior"}
_BATCH = 8


@torch.no_grad()
def evaluate_elbo(
    model: SegmentationModel, guide: MeanFieldNormal | None, patches: Patches, seed: int, noises: int = NOISES
) -> dict[str, Tensor]:
    """The ELBO and its parts at β = 1 on fixed patches, under noise that is the same for every model of a seed.

    Args:
        model: Trained model, on its device.
        guide: Guide; None draws sites from their prior.
        patches: Patches, all of which are taken.
        seed: Seed of the noise.
        noises: Samples of the weights.

    Returns:
        "elbo", "log_likelihood", "kl" and "log_prior", [noises] each, in nats.
    """
    device = next(model.network.parameters()).device
    batches = [[part.to(device) for part in batch] for batch in patch_loader(patches, _BATCH, device)]
    elbo = MeanFieldELBO()
    draw = (lambda *batch: {}) if guide is None else guide.forward
    model.eval()
    rows: dict[str, list[Tensor]] = {"elbo": []}
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for noise in range(noises):
            sums: dict[str, Tensor] = {}
            for batch in batches:
                torch.manual_seed(step_seed(seed, noise))  # one sample of the weights for all patches
                value = torch.tensor(-elbo.loss(model, draw, *batch))
                for name, term in {"elbo": value, **elbo.terms}.items():
                    sums[name] = sums.get(name, torch.zeros(())) + term.cpu() * len(batch[0]) / len(patches)
            for name, total in sums.items():
                rows.setdefault(name, []).append(total)
    return {name: torch.stack(row) for name, row in rows.items()}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values [n], and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def block_summaries(programs: Sequence[Program]) -> dict[str, dict[str, float | None]]:
    """Of each prior block, over the sites of all members.

    Returns:
        Block → "s_over_prior", the median ratio of a posterior to a prior standard deviation; "shift_over_prior", the
        root mean square of (m − a) in the prior's standard deviations; "kl_per_kernel" in nats; "prior_scale", the mean
        c. None where the prior has no width (log-uniform).
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for program in programs:
        assert program.guide is not None
        for site, block in program.blocks.items():
            for name, value in _site_summary(program.guide, site, program.priors[site]()):
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


def _site_summary(guide: MeanFieldNormal, site: str, prior: Any) -> Iterator[tuple[str, Tensor]]:
    loc, deviation = guide.posterior(site)
    q = guide.distribution(site)
    yield "kl", kl_divergence(q, prior)
    yield "kernels", torch.tensor([float(loc[:, :, 0].numel() // loc[0, 0, 0].numel())])
    base = prior.base_dist
    if isinstance(base, DeepWeightPrior):
        yield "scale", torch.as_tensor(base.scale)
        yield "square", base.standardise(loc).square()
        widths = base.density.scale_tril.square().sum(-1).sqrt().view(base.event_shape)
        # In the prior's own coordinates, where the posterior is diagonal there.
        yield "ratio", (guide.scale(site) if guide.unit(site).dim() == 2 else deviation / widths) / base.scale
    elif isinstance(base, Normal):
        yield "scale", base.scale.flatten()[:1]
        yield "square", ((loc - base.loc) / base.scale).square()
        yield "ratio", deviation / base.scale


def summarize(
    parts: Sequence[Mapping[str, Tensor]],
    nulls: Mapping[str, Tensor],
    dice: Sequence[float | None],
    blocks: Mapping[str, Any],
) -> dict[str, Any]:
    """The `summary` of a run.

    Args:
        parts: Of each member what `evaluate_elbo` returns.
        nulls: Null → its ELBO under the same noise, [noises], beside that of the first member.
        dice: Dice of each member on the validation cases.
        blocks: What `block_summaries` returns.
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
    """A line for each null whose ELBO the posterior's is not above by two standard errors."""
    for null, what in NULLS.items():
        above = summary.get(f"above_{null}")
        if above is not None and not above["nats"] > 2 * above["error"]:
            message(
                f"the ELBO is {above['nats']:+.0f} ± {above['error']:.0f} nats from that of {what}: under this prior "
                "the scans do not pay for what the posterior has learned from them"
            )


def report_unconverged(records: Sequence[Mapping[str, Any]], stage: str, steps: int) -> None:
    """A line if the last tenth of a stage's steps still raised the ELBO by more than its noise.

    Args:
        records: Lines of `metrics.jsonl`.
        stage: Stage of the training.
        steps: Its steps; a line is fitted to the losses of the last third.
    """
    points = [
        (record["step"], record["loss"])
        for record in records
        if record.get("stage") == stage and "loss" in record and record["step"] > steps * 2 / 3
    ]
    if len(points) < 5:
        return
    fitted = linregress(*zip(*points, strict=True))
    rise, error = -fitted.slope * steps / 10, fitted.stderr * steps / 10
    if rise > 2 * error:
        message(
            f"{stage}: the last tenth of the steps still raised the ELBO by {rise:.0f} ± {error:.0f} nats; "
            "more steps would raise it further"
        )
