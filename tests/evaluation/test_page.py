"""The page: what it says, that nothing shown becomes markup, and that its viewer works in a browser."""

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from dwp_pyro.evaluation.page import _ASSETS, Report, _inline_script, page
from dwp_pyro.evaluation.viewer import case_view
from tests.evaluation.browser import CHROMIUM, open_page

NASTY = """</script><script>alert('x')</script><img src=x onerror="alert(1)"> & 'quoted' "twice" {{ 1 }} {% x %} <!--"""

CURVES = {
    "reliability": {"confidence": [0.1, None, 0.9], "frequency": [0.2, None, 0.8], "count": [900, 0, 90]},
    "risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.01, 0.05]},
    "case_risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.1, 0.2]},
}


class Elements(HTMLParser):
    """Tags with their attributes, and text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def small_view(side: int = 12):
    x, y, z = np.indices((side,) * 3) - side // 2
    distance = np.sqrt(x**2 + y**2 + z**2)
    brain_mask = distance < side / 2
    probability = np.clip(1 - distance / (side / 2), 0, 1).astype(np.float32)
    image = np.where(brain_mask, 100 + 10.0 * x, 0).astype(np.float32)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    return case_view(
        "flair",
        affine,
        image,
        brain_mask,
        distance < 3,
        probability > 0.5,
        probability,
        probability * 0.6,
        probability * 0.1,
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(
        name="svi-run",
        summary="what it is",
        data={"layout": "brats"},
        roles={"train": ["a", "b"], "test": ["first", "second", "third"]},
        settings={"Training (svi)": {"evidence": 1.0, "widths": [2, 3], "spacing": None, "train_reverse_model": True}},
        training=[
            {"stage": "svi", "step": 10, "log_likelihood": -5.0, "kl": 4.0, "beta": 0.5},
            {"stage": "svi", "step": 20, "log_likelihood": -4.0, "kl": 4.0, "beta": 1.0, "validation_dice": 0.0},
        ],
        patients={"first": "first", "second": "second", "third": "third"},
        regions={
            "whole": {
                "first": {"dice": 0.9, "hd95": 2.0, "oddity": 0.5},
                "second": {"dice": 0.6, "hd95": None, "oddity": 0.25},
                "third": {"dice": 0.3, "hd95": 4.0, "oddity": 0.75},
            }
        },
        volumes_ml={"whole": {"first": 12.34, "second": 0.0, "third": 1.0}},
        curves={"whole": CURVES},
        shown="whole",
        views={"best": ("first", small_view())},
    )


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return page(report)


def rows(html: str) -> dict[str, list[str]]:
    """First cell of each row of a table → the others, as text."""
    found = {}
    for line in re.findall(r"<tr[^>]*>(.*?)</tr>", html):
        cells = [Elements(cell).text for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line)]
        found[cells[0]] = cells[1:]
    return found


def test_measures_have_intervals_whether_or_not_they_are_known(html: str):
    table = rows(html)
    dice = next(cells for name, cells in table.items() if name.startswith("Dice"))
    assert dice[:1] + dice[2:] == ["0.600", "0.300", "0.600", "0.900", "3"]
    low, high = map(float, dice[1].split(" to "))
    assert low == 0.3 and high == 0.9  # of 27 equally likely draws the outermost have 1/27 > 2.5 %
    assert table["oddity"][0] == "0.500"
    assert next(cells for name, cells in table.items() if name.startswith("HD95"))[-1] == "2"  # one is not defined
    assert table["firstbest"] == ["0.900", "2.0", "0.500", "12.3"]
    assert table["second"] == ["0.600", "–", "0.250", "0.0"]


def test_one_case_has_no_interval(report: Report):
    table = rows(page(replace(report, regions={"whole": {"first": {"dice": 0.9}}}, training=[])))
    assert next(cells for name, cells in table.items() if name.startswith("Dice"))[:2] == ["0.900", "–"]


def test_visits_of_a_patient_are_averaged_before_the_interval(report: Report):
    table = rows(page(replace(report, patients={"first": "p", "second": "q", "third": "p"})))
    dice = next(cells for name, cells in table.items() if name.startswith("Dice"))
    assert (dice[0], dice[-1]) == ("0.600", "2") and dice[1] == "0.600 to 0.600"  # (0.9 + 0.3) / 2 and 0.6
    assert next(cells for name, cells in table.items() if name.startswith("HD95"))[0] == "3.0"
    assert table["firstbest"] == ["0.900", "2.0", "0.500", "12.3"]


def test_settings_and_split_are_there(html: str):
    table = rows(html)
    assert table["widths"] == ["2, 3"] and table["spacing"] == ["–"] and table["train_reverse_model"] == ["yes"]
    assert table["train"] == ["2", "a, b"]


def test_curves_are_drawn_for_each_region(report: Report):
    html = page(replace(report, curves={"whole": CURVES, "core": CURVES}, training=[]))
    assert html.count('class="plot"') == 6 and "<h3>Core</h3>" in html and "no record of its training" in html


def test_plots_take_the_colours_of_the_page(html: str):
    assert html.count('class="plot"') == 4
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "currentColor" in svg and "#010203" not in svg and "<?xml" not in svg
    assert "predicted probability" in svg  # text is not drawn as paths


def test_the_policy_of_the_page_allows_no_request(html: str):
    policy = next(
        attributes["content"] for tag, attributes in Elements(html).tags if tag == "meta" and "http-equiv" in attributes
    )
    rules = {rule.split()[0]: set(rule.split()[1:]) for rule in policy.split(";")}
    assert rules.pop("default-src") == {"'none'"}
    assert all(sources <= {"'unsafe-inline'", "data:", "blob:"} for sources in rules.values())


def test_nothing_shown_becomes_markup(report: Report, html: str):
    nasty = replace(
        report,
        name=NASTY,
        summary=NASTY,
        data={NASTY: NASTY},
        roles={NASTY: [NASTY]},
        settings={NASTY: {NASTY: [NASTY]}},
        training=[{**record, "stage": NASTY} for record in report.training],
        patients={NASTY: NASTY},
        regions={NASTY: {NASTY: {"dice": 0.9, NASTY: 0.1}}},
        volumes_ml={NASTY: {NASTY: 1.0}},
        shown=NASTY,
        curves={NASTY: CURVES},
        views={"best": (NASTY, replace(report.views["best"][1], layers=_titled(report, NASTY)))},
    )
    plain, spoiled = Elements(html), Elements(page(nasty))
    assert {tag for tag, _ in spoiled.tags} <= {tag for tag, _ in plain.tags}
    assert [tag for tag, _ in spoiled.tags].count("script") == [tag for tag, _ in plain.tags].count("script") == 3
    assert not any(name.startswith("on") for _, attributes in spoiled.tags for name in attributes)
    assert spoiled.text.count(NASTY) >= 12  # shown as it is
    labels = [attributes["aria-label"] for _, attributes in spoiled.tags if attributes.get("type") == "range"]
    assert labels == [f"opacity of {NASTY}"] * 6


def _titled(report: Report, title: str):
    return tuple(replace(layer, title=title) for layer in report.views["best"][1].layers)


def test_the_page_asks_for_nothing(html: str):
    addresses = [
        value
        for _, attributes in Elements(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset") and not (value or "").startswith("#")
    ]
    assert addresses == []
    assert not re.search(r"url\((?!#)|@import", html[: html.index("<script>")])
    assert "default-src 'none'" in html


def test_scripts_within_the_page_cannot_end_early():
    assert _inline_script("a = '</script>'; b = /<!--/; c = 1 < /x/") == r"a = '<\/script>'; b = /<\!--/; c = 1 < /x/"


def test_the_vendored_viewer_is_the_released_one():
    digest = hashlib.sha256((_ASSETS / "niivue/niivue.umd.js").read_bytes()).hexdigest()
    assert digest in (_ASSETS / "niivue/README.md").read_text()


def test_the_viewers_volumes_are_in_the_page(report: Report, html: str):
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])
    view = report.views["best"][1]
    assert [layer["title"] for layer in data["layers"]] == [layer.title for layer in view.layers]
    assert data["focus"] == list(view.focus)
    truth, probability = (data["layers"][number]["colors"] for number in (1, 3))
    assert [truth[channel][-1] for channel in "RGBAI"] == [0x00, 0x9E, 0x73, 255, 255]
    assert list(zip(probability["I"], probability["A"], strict=True))[1:4] == [(16, 0), (26, 0), (27, 255)]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_the_viewer_works_in_a_browser(html: str, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    control = "document.querySelectorAll('.layer')[{}]"

    def change(layer: int, shown: bool, opacity: int) -> None:
        tab.run(
            f"(() => {{ const [box, slider] = {control.format(layer)}.querySelectorAll('input');"
            f"box.checked = {str(shown).lower()}; slider.value = {opacity};"
            "slider.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    with open_page(path, tmp_path / "profile") as tab:
        tab.run("document.querySelector('.viewer').scrollIntoView({behavior: 'instant'})")
        tab.wait_for("document.querySelector('.viewer').dataset.state !== 'waiting'")
        assert tab.run("document.querySelector('.viewer').dataset.state") == "ready"
        assert tab.run("document.querySelector('.values').textContent") == (
            "12, 12, 12 mm  ·  flair 100  ·  truth 1  ·  prediction 1  ·  probability 1.00  ·  entropy 0.60 nats"
            "  ·  mutual information 0.100 nats"
        )
        pictures = [tab.picture(".stage canvas")]
        assert pictures[0].std() > 0.05, "nothing is drawn"
        for layer, shown, opacity in ((1, False, 50), (2, False, 50), (3, True, 100), (3, True, 30), (4, True, 100)):
            change(layer, shown, opacity)
            pictures.append(tab.picture(".stage canvas"))
            assert np.abs(pictures[-1] - pictures[-2]).max() > 0.1, f"layer {layer} did not change"
        grey = pictures[2]  # the image alone
        assert np.abs(grey[..., 0] - grey[..., 2]).max() < 0.05
        full, faint = (np.abs(pictures[n] - grey).mean() for n in (3, 4))
        assert faint == pytest.approx(0.3 * full, rel=0.1)
        change(3, False, 100)
        change(4, False, 100)
        change(1, True, 100)
        truth = np.abs(tab.picture(".stage canvas") - np.array([0, 0x9E, 0x73]) / 255).max(-1) < 0.02
        assert truth.sum() > 1000
        mixed = (grey + np.array([0, 0x9E, 0x73]) / 255) / 2
        change(1, True, 50)
        assert tab.picture(".stage canvas")[truth] == pytest.approx(mixed[truth], abs=0.03)
        assert tab.problems() == []
        assert {url.partition(":")[0] for url in tab.requests()} <= {"file", "data", "blob"}
        assert [url for url in tab.requests() if url.startswith("file:")] == [path.resolve().as_uri()]
