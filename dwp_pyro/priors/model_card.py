"""The card of a kernel prior: provenance, license, held-out density."""

from __future__ import annotations

from typing import Any

from dwp_pyro.priors.kernel_prior import ANY_SITE, KernelPrior
from dwp_pyro.runtime.table import Table

__all__ = ["model_card"]

_NOT_STATED = "not stated"


def model_card(prior: KernelPrior) -> tuple[Table, Table]:
    """Return two tables: the origin and license of a prior, and the scores of its blocks.

    What a prior does not state is "not stated"; "kernel file", "merged from" and "privacy" are left out if they do not
    apply.
    """
    provenance = prior.provenance
    network = provenance.get("network")
    network = network if isinstance(network, dict) else {}
    spacing = network.get("spacing")
    trained, snapshots = provenance.get("bootstraps"), provenance.get("snapshots")
    rows = [
        ["source", _text(provenance.get("source"))],
        ["license", _text(provenance.get("license"))],
        ["layout of the scans", _text(provenance.get("dataset"))],
        # Early priors state "modality" and nothing else about the network.
        ["modalities", _text(network.get("modalities") or provenance.get("modality"))],
        ["voxels", (f"{spacing} mm" if spacing else "as scanned") if network else _NOT_STATED],
        ["normalization", _text(provenance.get("normalization"))],
        ["widths of the network", _text(network.get("widths"))],
        ["source networks", f"{trained}, {snapshots} snapshots" if trained else _NOT_STATED],
        ["kernels", f"{sum(info.kernels for info in prior.block_infos.values())} in {len(prior.block_infos)} blocks"],
    ]
    for name, key in (("kernel file", "kernels"), ("merged from", "parents"), ("privacy", "privacy")):
        if provenance.get(key) is not None:
            rows.append([name, _text(provenance[key])])
    names = list(dict.fromkeys(name for info in prior.block_infos.values() for name in info.nats_per_kernel))
    blocks = [
        [
            name,
            "every site" if ANY_SITE in info.sites else str(len(info.sites)),
            "×".join(map(str, prior.block(name).kernel_shape)),
            str(info.kernels),
            f"{float(prior.block(name).root_mean_square()):.4f}",
            *(f"{info.nats_per_kernel[nats]:.1f}" if nats in info.nats_per_kernel else "-" for nats in names),
        ]
        for name, info in prior.block_infos.items()
    ]
    header = ["block", "convolutions", "kernel", "kernels", "rms weight", *(name.replace("_", " ") for name in names)]
    scores = "From the sixth column on: log-density of held-out kernels in nats per kernel; higher is better."
    return (
        Table(["kernel prior", prior.family], rows, "The prior holds densities of kernels and no images."),
        Table(header, blocks, scores if names else "No kernels were held out to score it on."),
    )


def _text(value: Any) -> str:
    if value is None:
        return _NOT_STATED
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
