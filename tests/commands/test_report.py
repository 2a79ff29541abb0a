"""The command report: a page about an evaluated run, or one line about what is missing."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from dwp_pyro.evaluation import evaluate as evaluation
from dwp_pyro.evaluation.report import _best_median_worst
from tests.world import SVI_RUN, call, error_line


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory) -> Path:
    """Copy the world and evaluate a run; tests must not change it."""
    copy = tmp_path_factory.mktemp("evaluated") / "world"
    shutil.copytree(world.path, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        patch.delenv("DWP_PYRO_DATA", raising=False)
        assert call("evaluate", SVI_RUN, "--samples", 2).exit_code == 0
    return copy


@pytest.fixture
def copy_of_evaluated(evaluated, tmp_path, monkeypatch) -> Path:
    shutil.copytree(evaluated, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.delenv("DWP_PYRO_DATA", raising=False)
    return tmp_path / "world"


def test_the_page_is_about_the_run(command, copy_of_evaluated):
    evaluation = json.loads(Path(SVI_RUN, "evaluation.json").read_text())
    with open(f"{SVI_RUN}/metrics.jsonl", "a") as file:
        file.write('{"stage": "svi", "st')  # cut short by a kill
    result = command("report", SVI_RUN)
    assert result.exit_code == 0, result.output
    assert f"Report: {SVI_RUN}/report.html" in result.output
    html = Path(SVI_RUN, "report.html").read_text(encoding="utf-8")
    for case, metrics in evaluation["regions"]["whole"]["cases"].items():
        assert case in html and f"{metrics['nll']:.4f}" in html
    summary = json.loads(Path(SVI_RUN, "run.json").read_text())["summary"]
    terms = [f"{summary[name]:,.0f} ± " for name in ("elbo", "log_likelihood", "kl", "log_prior")]
    assert all(term in html for term in terms)
    assert html.count('class="viewer"') == 2 and "Best: " in html and "Worst: " in html
    assert html.count('class="plot"') == 4  # training, reliability, risk-coverage of voxels and of cases
    assert "Not a medical device" in html and "data/brats" in html and "prior.safetensors" in html


def test_another_output_file_and_moved_scans(command, copy_of_evaluated):
    Path("data/brats").rename("elsewhere")
    result = command("report", SVI_RUN, "--out", "pages/one.html", "--root", "elsewhere")
    assert result.exit_code == 0, result.output
    assert Path("pages/one.html").stat().st_size > 2_000_000 and not Path(SVI_RUN, "report.html").exists()


def test_a_region_that_the_run_does_not_segment(command, copy_of_evaluated):
    result = command("report", SVI_RUN, "--region", "core")
    assert result.exit_code == 2
    assert error_line(result.stderr) == f"Error: region: 'core' is not one of whole, which {SVI_RUN} segments"


def not_evaluated(run: Path) -> None:
    (run / "evaluation.json").unlink()


def prediction_gone(run: Path) -> None:
    next((run / "predictions").glob("*.json")).unlink()


def damaged(run: Path) -> None:
    (run / "evaluation.json").write_text('{"prediction": {}, "regions": {"whole": {"cases": {"a": 5}}}}')


def other_cases(run: Path) -> None:
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"test": split["test"][:1]}))


def other_label(run: Path) -> None:
    label = next(Path("data/brats").rglob(f"{json.loads((run / 'split.json').read_text())['test'][0]}_seg.nii.gz"))
    label.write_bytes(gzip.compress(gzip.decompress(label.read_bytes()), 1))  # other bytes are enough


def moved(run: Path) -> None:
    Path("data/brats").rename("elsewhere")


def folder_in_the_way(run: Path) -> None:
    (run / "report.html").mkdir()


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (not_evaluated, f"{SVI_RUN}: is not evaluated yet; run 'dwp-pyro evaluate {SVI_RUN}' first"),
        (prediction_gone, f"run 'dwp-pyro evaluate {SVI_RUN}' again"),
        (damaged, "evaluation.json: is not an evaluation of this version"),
        (other_cases, "evaluation.json: is of other test cases or regions than the run"),
        (other_label, "evaluation.json: is of another label of '"),
        (moved, "data/brats: no such folder"),
        (folder_in_the_way, "report.html: is a folder"),
    ],
)
def test_missing_inputs_are_reported_in_one_line(command, copy_of_evaluated, damage, culprit):
    damage(Path(SVI_RUN))
    before = sorted(copy_of_evaluated.rglob("*"))
    result = command("report", SVI_RUN)
    assert result.exit_code == 2 and culprit in error_line(result.stderr), result.output
    assert sorted(copy_of_evaluated.rglob("*")) == before


@pytest.mark.slow
def test_predictions_that_another_process_replaces_are_not_measured(command, copy_of_evaluated, monkeypatch):
    measure = evaluation._measure_all

    def disturbed(*arguments):
        assert command("predict", SVI_RUN, "data/brats", "--samples", 6, "--overwrite").exit_code == 0
        return measure(*arguments)

    monkeypatch.setattr(evaluation, "_measure_all", disturbed)
    before = Path(SVI_RUN, "evaluation.json").read_bytes()
    result = command("evaluate", SVI_RUN, "--samples", 4)
    assert result.exit_code == 2 and "another process has replaced predictions" in result.stderr
    assert Path(SVI_RUN, "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ({"a": 0.5}, {"only case": "a"}),
        ({"a": 0.5, "b": 0.7}, {"best": "b", "worst": "a"}),
        ({"a": 0.5, "b": 0.7, "c": 0.6}, {"best": "b", "median": "c", "worst": "a"}),
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.9}, {"best": "d", "median": "b", "worst": "c"}),
    ],
)
def test_which_cases_are_shown(dice, chosen):
    assert _best_median_worst({name: {"dice": value} for name, value in dice.items()}) == chosen
