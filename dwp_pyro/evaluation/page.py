"""The HTML page about an evaluated run: one file with style, scripts, plots and scans inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from dwp_pyro.evaluation.viewer import CaseView, Layer
from dwp_pyro.metrics import EMPTY_MASK_POLICY, HEADLINE, MEASURES
from dwp_pyro.metrics.bootstrap import bootstrap_interval
from dwp_pyro.metrics.summary import patient_means
from dwp_pyro.plots.curves import reliability_figure, risk_coverage_figure, training_figure
from dwp_pyro.plots.style import to_svg

__all__ = ["Metrics", "Report", "page"]

#: Measure → value; None where it is not defined.
Metrics = Mapping[str, float | None]

_ASSETS = files("dwp_pyro.evaluation") / "assets"
_SHADES = 17  # points of a color map; the viewer interpolates between them


@dataclass(frozen=True)
class Report:
    """Content of a page.

    Args:
        name: Name of the run.
        summary: One-line description of the run.
        data: Properties of the scans: name → value.
        roles: Role in the split → case ids.
        settings: Heading → name → value.
        training: Lines of `metrics.jsonl`.
        patients: Test case → patient.
        regions: Region → test case → metrics.
        volumes_ml: Region → test case → predicted volume.
        curves: Region → curve → its points, as in evaluation.json.
        shown: Region in the views.
        views: Rank of a case ("best", …) → its id and its view.
    """

    name: str
    summary: str
    data: Mapping[str, str]
    roles: Mapping[str, Sequence[str]]
    settings: Mapping[str, Mapping[str, Any]]
    training: Sequence[Mapping[str, Any]]
    patients: Mapping[str, str]
    regions: Mapping[str, Mapping[str, Metrics]]
    volumes_ml: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Mapping[str, Any]]
    shown: str
    views: Mapping[str, tuple[str, CaseView]]


def page(report: Report) -> str:
    """Render `assets/report.html.j2`: a page that holds all it needs and whose policy forbids requests."""
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        regions={region: _results(report, region) for region in report.regions},
        views=[_view(report, rank) for rank in report.views],
        plots={region: _plots(curves) for region, curves in report.curves.items()},
        training=to_svg(training_figure, report.training),
        settings={title: {n: _plain(value) for n, value in of.items()} for title, of in report.settings.items()},
        empty_masks=EMPTY_MASK_POLICY,
        license=_asset("niivue/LICENSE"),
        style=_asset("report.css"),
        scripts=[_inline_script(_asset(name)) for name in ("niivue/niivue.umd.js", "report.js")],
    )


def _results(report: Report, region: str) -> dict[str, Any]:
    """Rows of the two tables of a region: measures over cases, and cases."""
    cases = report.regions[region]
    measures = list(dict.fromkeys(name for metrics in cases.values() for name in metrics))
    columns = [name for name in measures if name in HEADLINE or name not in MEASURES]
    ranks = {case: rank for rank, (case, _) in report.views.items()} if region == report.shown else {}
    known = {case: {n: x for n, x in metrics.items() if x is not None} for case, metrics in cases.items()}
    means = patient_means(known, report.patients)
    over_patients = [
        {"name": name, "title": _title(name), "cells": _statistics(name, [m.get(name) for m in means])}
        for name in measures
    ]
    per_case = []
    for case, metrics in cases.items():
        cells = [*(_number(name, metrics.get(name)) for name in columns), f"{report.volumes_ml[region][case]:.1f}"]
        per_case.append({"id": case, "rank": ranks.get(case), "cells": cells})
    return {"measures": over_patients, "titles": [_title(name) for name in columns], "cases": per_case}


def _statistics(measure: str, values: Sequence[float | None]) -> list[str]:
    """Mean, interval, lowest, median, highest and number of the defined values."""
    defined = np.array([value for value in values if value is not None and not np.isnan(value)])
    if len(defined) == 0:
        return ["–"] * 5 + ["0"]
    interval = "–"
    if len(defined) > 1:
        _, low, high = bootstrap_interval(defined[None])
        interval = f"{_number(measure, low)} to {_number(measure, high)}"
    mean, *spread = (_number(measure, f(defined)) for f in (np.mean, np.min, np.median, np.max))
    return [mean, interval, *spread, f"{len(defined)}"]


def _view(report: Report, rank: str) -> dict[str, Any]:
    """A case in the viewer: its metrics, and what the controls of its layers and `report.js` read."""
    case, view = report.views[rank]
    metrics = report.regions[report.shown][case]
    return {
        "rank": rank,
        "case": case,
        "metrics": ", ".join(f"{_title(n)} {_number(n, value)}" for n, value in metrics.items() if n in HEADLINE),
        "data": {"focus": view.focus, "layers": [_layer_data(layer) for layer in view.layers]},
    }


def _layer_data(layer: Layer) -> dict[str, Any]:
    # As many decimals as distinguish the levels of a map.
    digits = 0 if _is_mask(layer) else int(np.clip(np.ceil(1.5 - np.log10(layer.high - layer.low)), 0, 6))
    return {
        **asdict(layer),
        "digits": digits,
        "opacity": f"{layer.opacity * 100:.0f}",
        "gradient": [to_hex(_color(layer, fraction)) for fraction in np.linspace(0, 1, _SHADES)],
        "range": () if _is_mask(layer) else (f"{layer.low:.3g}", f"{layer.high:.3g} {layer.unit}".strip()),
        "colors": _color_map(layer),
        "nifti": base64.b64encode(layer.nifti).decode(),
    }


def _color_map(layer: Layer) -> dict[str, list[int]]:
    """Colors of a layer in NiiVue's format: red, green, blue, alpha and level, each from 0 to 255."""
    last_hidden = round(255 * layer.hidden)
    levels = np.unique([*np.linspace(0, 255, _SHADES).round().astype(int), last_hidden, last_hidden + 1])
    colors = 255 * np.array([_color(layer, level / 255) for level in levels])
    columns = (*colors.T, 255 * (levels > last_hidden), levels)  # alpha is 0 or 255; the slider sets the opacity
    return {name: np.rint(column).astype(int).tolist() for name, column in zip("RGBAI", columns, strict=True)}


def _color(layer: Layer, fraction: float) -> tuple[float, float, float]:
    r, g, b = to_rgb(layer.colors if _is_mask(layer) else colormaps[layer.colors](fraction))
    return r, g, b


def _is_mask(layer: Layer) -> bool:
    return layer.colors.startswith("#")


def _plots(curves: Mapping[str, Any]) -> dict[str, str]:
    """Curve → its plot, an SVG element."""
    plots = {"reliability": to_svg(reliability_figure, **curves["reliability"])}
    for name, unit in (("risk_coverage", "voxels"), ("case_risk_coverage", "cases")):
        panels = {"": (curves[name]["coverage"], curves[name]["risk"], unit)}
        plots[name] = to_svg(risk_coverage_figure, panels)
    return plots


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _title(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.replace("_", " ")


def _number(measure: str, value: float | None) -> str:
    _, digits = MEASURES.get(measure, ("", 3))
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _asset(name: str) -> str:
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")


def _inline_script(code: str) -> str:
    """Escape what ends a script element in HTML; strings and regular expressions keep their meaning."""
    return re.sub(r"<(/script|!--)", r"<\\\1", code, flags=re.IGNORECASE)
