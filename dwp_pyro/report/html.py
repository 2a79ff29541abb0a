"""One page about an evaluated run: everything in it, nothing fetched."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from dwp_pyro.metrics import HEADLINE, MEASURES
from dwp_pyro.report.comparison import bootstrap_interval
from dwp_pyro.report.figures import reliability_svg, risk_coverage_svg, training_svg
from dwp_pyro.report.layers import CaseView, Layer

__all__ = ["Figures", "Report", "page"]

#: Measure → value; None where it is not defined.
Figures = Mapping[str, float | None]

_ASSETS = files("dwp_pyro.report") / "assets"
_SHADES = 17  # points of a colour map, between which the viewer interpolates
_IDS_IN_SIGHT = 12

#: Refuses every request but those for data within the page, whatever a script in it asks for.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src data: blob:"
)

_MEANING = {
    "dice": "overlap of prediction and truth: 1 all, 0 none",
    "iou": "their overlap as a part of both together: 1 all, 0 none",
    "nsd": "part of both outlines within 1 mm of each other: 1 is best",
    "lesion_dice": "overlap lesion by lesion, missed and false ones counting 0",
    "lesion_f1": "lesions found, against missed and false ones: 1 is best",
    "hd95": "95 % of each outline lie within this distance of the other outline",
    "nll": "how much the truth surprises the given probabilities, over the brain: 0 is best",
    "brier": "mean square of probability minus truth, over the brain: 0 is best",
    "ace": "as ECE, with as many voxels in each bin",
    "mce": "largest gap of a bin",
    "qu_brats": "whether what is wrong is uncertain, and what is right certain: 1 is best",
    "aurc": "error that is left when the most certain are kept, averaged over how many: 0 is best",
    "pairwise_dice": "how far the weight samples agree: low where a case has likely failed",
    "ece": "mean gap between a probability given and how often it comes true, over the brain: 0 is best",
}


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Args:
        name: of the run.
        summary: a line that says what it is.
        data: what the scans are: name → value.
        roles: role in the split → case ids.
        settings: heading → name → value.
        training: lines of `metrics.jsonl`.
        regions: region → test case → measures.
        volumes_ml: region → test case → volume that is predicted.
        empty_masks: the policy that the measures follow.
        curves: region → curve → its points, as in evaluation.json.
        shown: the region in the views.
        views: which it is of the cases ("best", …) → its id and what to show of it.
    """

    name: str
    summary: str
    data: Mapping[str, str]
    roles: Mapping[str, Sequence[str]]
    settings: Mapping[str, Mapping[str, Any]]
    training: Sequence[Mapping[str, Any]]
    regions: Mapping[str, Mapping[str, Figures]]
    volumes_ml: Mapping[str, Mapping[str, float]]
    empty_masks: str
    curves: Mapping[str, Mapping[str, Any]]
    shown: str
    views: Mapping[str, tuple[str, CaseView]]


def page(report: Report) -> str:
    """The whole HTML page: style, scripts, plots and scans are within, and its policy forbids any request."""
    sections = {
        "Results": _results(report),
        "Cases to look at": _views(report),
        "Are the probabilities right?": _calibration(report.curves),
        "Training": _training(report.training),
        "Data": _data(report),
        "Settings": _settings(report.settings),
    }
    links = "".join(f'<li><a href="#{_anchor(title)}">{escape(title)}</a></li>' for title in sections)
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{content}</section>'
        for title, content in sections.items()
    )
    shown = ", ".join(name for name, _ in report.views.values())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(report.name)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<div class="layout">
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>
<header>
<h1>{escape(report.name)}</h1>
<p class="soft">{escape(report.summary)}</p>
<p class="notice">Not a medical device. For research only.</p>
</header>
{body}
<footer class="soft">
<p>This page holds images of {escape(shown)}: share it only where the scans themselves may be shared. It opens without a
network, and sends nothing.</p>
<details><summary>Made with dwp-pyro; the viewer is NiiVue, BSD 2-Clause licence</summary>
<pre>{escape(_asset("niivue/LICENSE"))}</pre></details>
</footer>
</main>
</div>
<script>{_inline_script(_asset("niivue/niivue.umd.js"))}</script>
<script>{_inline_script(_asset("report.js"))}</script>
</body>
</html>
"""


def _results(report: Report) -> str:
    parts = []
    for number, (region, cases) in enumerate(report.regions.items()):
        if len(report.regions) > 1:
            parts.append(f"<h3>{escape(region.capitalize())}</h3>")
        ranks = {case: rank for rank, (case, _) in report.views.items()} if region == report.shown else {}
        parts.append(
            _measures(cases, explained=number == 0)
            + "<h4>Each test case</h4>"
            + _each(cases, report.volumes_ml[region], ranks)
        )
    parts.append(
        f"<p class='caption'>Over {len(report.regions[report.shown])} test cases, which the training never saw. The "
        "interval says where the mean over other cases like these may well lie: it resamples cases (bootstrap), not "
        f"the training. Empty masks: {escape(report.empty_masks)}.</p>"
    )
    return "".join(parts)


def _measures(cases: Mapping[str, Figures], explained: bool) -> str:
    rows = []
    for name in _names(cases):
        values = np.array([np.nan if (v := case.get(name)) is None else v for case in cases.values()])
        values = values[~np.isnan(values)]
        title = escape(_title(name))
        if explained and name in _MEANING:
            title += f"<br><span class='soft'>{escape(_MEANING[name])}</span>"
        if len(values) > 1:
            mean, low, high = (_number(name, x) for x in bootstrap_interval(values[None]))
            interval = f"{low} to {high}"
        else:
            mean, interval = (_number(name, float(values[0])) if len(values) else "–"), "–"
        spread = [_number(name, f(values)) if len(values) else "–" for f in (np.min, np.median, np.max)]
        rows.append([title, mean, interval, *spread, f"{len(values)}"])
    return _table(["measure", "mean", "95 % interval", "lowest", "median", "highest", "cases"], rows)


def _each(cases: Mapping[str, Figures], volumes_ml: Mapping[str, float], ranks: Mapping[str, str]) -> str:
    names = [name for name in _names(cases) if name in HEADLINE or name not in MEASURES]
    rows = []
    for case, figures in cases.items():
        tag = f'<a class="tag" href="#{_anchor(ranks[case])}">{ranks[case]}</a>' if case in ranks else ""
        rows.append(
            [escape(case) + tag, *(_number(name, figures.get(name)) for name in names), f"{volumes_ml[case]:.1f}"]
        )
    titles = [escape(_title(name)) for name in names]
    return _table(["case", *titles, "predicted (ml)"], rows, marked=[case in ranks for case in cases])


def _names(cases: Mapping[str, Figures]) -> list[str]:
    return list(dict.fromkeys(name for case in cases.values() for name in case))


def _views(report: Report) -> str:
    parts = [
        f"<p class='caption'>The cases with the highest, the middle and the lowest Dice of “{escape(report.shown)}”. "
        "Click or drag in a plane to move; scroll, after a click, to leaf; drag with the right button to change the "
        "window. The person's right is on the left. Values at the cross stand below the planes. Below a tenth of its "
        "scale a map is transparent.</p>"
    ]
    for rank, (case, view) in report.views.items():
        figures = ", ".join(
            f"{_title(name)} {_number(name, value)}"
            for name, value in report.regions[report.shown][case].items()
            if name in HEADLINE
        )
        parts.append(
            f'<h3 id="{_anchor(rank)}">{escape(rank.capitalize())}: {escape(case)}</h3>'
            f"<figure>{_viewer(view)}<figcaption>{escape(figures)}.</figcaption></figure>"
        )
    parts.append(
        "<p class='caption'>Probability: of belonging to the region; the prediction is where it is above one half. "
        "Entropy: how unsure the network is of a voxel, most where the probability is one half. Mutual information: "
        "the part of the entropy that comes from what the sampled weights disagree on.</p>"
    )
    return "".join(parts)


def _viewer(view: CaseView) -> str:
    controls = "".join(_control(layer) for layer in view.layers)
    data = {
        "focus": view.focus,
        "layers": [
            {
                "title": layer.title,
                "unit": layer.unit,
                "low": layer.low,
                "high": layer.high,
                "digits": _digits(layer),
                "colours": _shades(layer),
                "nifti": base64.b64encode(layer.nifti).decode(),
            }
            for layer in view.layers
        ],
    }
    return (
        '<div class="viewer" data-state="waiting"><div class="stage"><canvas tabindex="0"></canvas>'
        f'<p>loading …</p></div><output class="values"></output><div class="layers">{controls}</div>'
        f'<script type="application/json">{_inline_json(data)}</script></div>'
    )


def _control(layer: Layer) -> str:
    title = escape(layer.title)
    scale = f'<i style="background: {_gradient(layer)}"></i>'
    if not layer.colours.startswith("#"):
        low, high = (f"{value:.3g}" for value in (layer.low, layer.high))
        scale += f"<b><span>{low}</span><span>{escape(f'{high} {layer.unit}'.strip())}</span></b>"
    return (
        f'<div class="layer"><label><input type="checkbox"{" checked" if layer.shown else ""}>{title}</label>'
        f'<span class="scale">{scale}</span><input type="range" min="0" max="100" value="{layer.opacity * 100:.0f}" '
        f'aria-label="opacity of {title}"></div>'
    )


def _colour(layer: Layer, part: float) -> tuple[float, float, float]:
    r, g, b = to_rgb(layer.colours if layer.colours.startswith("#") else colormaps[layer.colours](part))
    return r, g, b


def _shades(layer: Layer) -> dict[str, list[int]]:
    """The layer's colours as the viewer takes them: red, green, blue, alpha and level, each 0 to 255."""
    last_hidden = round(255 * layer.hidden)
    levels = np.unique([*np.linspace(0, 255, _SHADES).round().astype(int), last_hidden, last_hidden + 1])
    colours = 255 * np.array([_colour(layer, level / 255) for level in levels])
    columns = (*colours.T, 255 * (levels > last_hidden), levels)  # seen or not; how much is said by the slider
    return {name: np.rint(column).astype(int).tolist() for name, column in zip("RGBAI", columns, strict=True)}


def _gradient(layer: Layer) -> str:
    stops = (to_hex(_colour(layer, part)) for part in np.linspace(0, 1, _SHADES))
    return f"linear-gradient(to right, {', '.join(stops)})"


def _digits(layer: Layer) -> int:
    """Decimals at which the levels of a layer can be told apart; a region has none."""
    return 0 if layer.colours.startswith("#") else int(np.clip(np.ceil(1.5 - np.log10(layer.high - layer.low)), 0, 6))


def _calibration(curves: Mapping[str, Mapping[str, Any]]) -> str:
    if not any(curves.values()):
        return "<p class='soft'>The evaluation of this run holds no reliability or risk-coverage curves.</p>"
    parts = []
    for region, of_region in curves.items():
        plots = []
        if "reliability" in of_region:
            caption = (
                "Voxels of the brain by the probability they were given. On the dashed line, of the voxels given 70 % "
                "seven in ten are region; below it the network is too sure. The bars say how many voxels there are."
            )
            plots.append(_plot("Reliability", reliability_svg(**of_region["reliability"]), caption))
        for name, title, unit in (("risk_coverage", "Voxels", "voxels"), ("case_risk_coverage", "Cases", "cases")):
            if name in of_region:
                points = {key: of_region[name][key] for key in ("coverage", "risk")}
                svg = risk_coverage_svg(**points, unit=unit)
                caption = (
                    f"{title}: the error (risk) that is left when only the most certain {unit} are kept. A curve that "
                    f"falls to the left says that the network knows which {unit} to pass on to a human."
                )
                plots.append(_plot(f"Risk and coverage of {unit}", svg, caption))
        parts.append(
            (f"<h3>{escape(region.capitalize())}</h3>" if len(curves) > 1 else "")
            + f'<div class="plots">{"".join(plots)}</div>'
        )
    return "".join(parts)


def _training(records: Sequence[Mapping[str, Any]]) -> str:
    svg = training_svg(records)
    if not svg:
        return "<p class='soft'>The run has no record of its training.</p>"
    caption = (
        "How the training went, a line a network. Log-likelihood: how well the network explains the patches of a step; "
        "ragged, but it should rise and level off. KL: how far the network is from the prior. Dice of validation "
        "cases: overlap on scans that are not trained on."
    )
    return _plot("Curves of the training", svg, caption)


def _data(report: Report) -> str:
    rows = []
    for role, ids in report.roles.items():
        listed = escape(", ".join(ids)) or "–"
        if len(ids) > _IDS_IN_SIGHT:
            listed = f"<details><summary>list</summary>{listed}</details>"
        rows.append([escape(role), f"{len(ids)}", listed])
    facts = [[escape(name), escape(value)] for name, value in report.data.items()]
    return _table(["", ""], facts, numbers=()) + _table(["role", "cases", "which"], rows, numbers=(1,))


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for heading, values in settings.items():
        rows = [[escape(name), escape(_plain(value))] for name, value in values.items()]
        parts.append(f"<h3>{escape(heading)}</h3>" + _table(["", ""], rows, numbers=()))
    return "".join(parts)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _plot(title: str, svg: str, caption: str) -> str:
    return (
        f'<figure><div class="plot" role="img" aria-label="{escape(title)}">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int] | None = None,
    marked: Sequence[bool] = (),
) -> str:
    """A table of HTML cells; the columns of numbers, all but the first unless they are named, to the right."""
    rows = list(rows)
    numbers = range(1, len(header)) if numbers is None else numbers
    kinds = [' class="number"' if column in numbers else "" for column in range(len(header))]
    head = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, header, strict=True))
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr{' class=marked' if index < len(marked) and marked[index] else ''}>{cells}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def _title(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.replace("_", " ")


def _number(measure: str, value: float | None) -> str:
    _, digits = MEASURES.get(measure, ("", 3))
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z]+", "-", text.lower()).strip("-")


def _asset(name: str) -> str:
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")


def _inline_script(code: str) -> str:
    """Code that no parser of HTML takes for the end of its element; strings and patterns in it keep their meaning."""
    return re.sub(r"<(/script|!--)", r"<\\\1", code, flags=re.IGNORECASE)


def _inline_json(value: Any) -> str:
    return json.dumps(value).replace("<", "\\u003c")
