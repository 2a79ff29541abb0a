"""Study files: order of runs, precedence of settings, and errors."""

from pathlib import Path

import pytest
import yaml

from dwp_pyro.config.training import FinetuneConfig, SviConfig
from dwp_pyro.runtime.errors import ConfigError
from dwp_pyro.study.grid import Study

METHODS = {
    "DWP": {"command": "svi", "prior": "dwp"},
    "UNet-RI": {"command": "finetune", "init": "random", "learning-rate": 0.004},
}
RUNS = [{"methods": ["DWP", "UNet-RI"], "n": [5, 10], "seeds": [0, 1]}]


@pytest.fixture
def read(tmp_path: Path):
    def make(**content) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"methods": METHODS, "runs": RUNS} | content, sort_keys=False))
        return Study.read(path)

    return make


def test_all_methods_come_before_the_next_n_and_every_n_before_the_next_seed(read):
    more = [*RUNS, {"methods": ["DWP"], "n": [5], "seeds": [1, 7]}]
    assert [study_run.key for study_run in read(runs=more).runs] == [
        (method, n, seed) for seed in (0, 1) for n in (5, 10) for method in ("DWP", "UNet-RI")
    ] + [("DWP", 5, 7)]


def test_the_settings_of_a_method_override_shared_ones(read):
    shared = {"steps": 7, "learning-rate": 0.001, "batch_size": 2, "init-scale": 0.02}
    dwp, unet, *_ = read(settings=shared).runs
    assert dwp.config == SviConfig(prior="dwp", steps=7, learning_rate=0.001, batch_size=2, init_scale=0.02)
    assert unet.config == FinetuneConfig(steps=7, learning_rate=0.004, batch_size=2)


def test_defaults(read):
    study = read()
    assert (study.evaluate, study.samples, study.reference) == ("test", 10, None)


def test_names_of_methods_may_be_numbers(read):
    methods = {1: {"command": "svi"}, 2: {"command": "finetune"}}
    assert read(methods=methods, runs=[{"methods": [1, 2], "n": [5], "seeds": [3]}], reference=1).reference == "1"


def test_the_names_of_files_are_safe(read):
    methods = {"β / 2": {"command": "svi", "evidence": 0.5}}
    (study_run,) = read(methods=methods, runs=[{"methods": ["β / 2"], "n": [5], "seeds": [3]}]).runs
    assert study_run.name == "β-2-n5-seed3" and str(study_run) == "β / 2, n 5, seed 3"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"sample": 3}, "study: 'sample' is not one of evaluate, methods,"),
        ({"settings": {"stepz": 3}}, "settings: 'stepz' is not one of"),
        ({"settings": {"seed": 3}}, "settings: 'seed' is not one of"),
        ({"settings": {"steps": 0}}, "method 'DWP': steps: must be at least 1"),
        ({"settings": 3}, "settings: should hold"),
        ({"methods": None}, "methods: should hold"),
        ({"methods": {"DWP": {"prior": "dwp"}}}, "method 'DWP': 'command' should be one of svi, finetune, got None"),
        ({"methods": {"DWP": {"command": "svi", "trainable": "all"}}}, "method 'DWP': 'trainable' is not a setting"),
        ({"methods": {"DWP": {"command": "svi", "n": 3}}}, "method 'DWP': 'n' belongs in the runs"),
        (
            {"methods": {"a b": METHODS["DWP"], "A-b": METHODS["DWP"]}},
            "method 'a b': another method would have the same",
        ),
        ({"runs": []}, "runs: should be a list"),
        ({"runs": [{"methods": ["DWP"], "n": 5, "seeds": [0]}]}, "runs: n: should be a list"),
        ({"runs": [{"methods": ["DWP"], "n": [5]}]}, "runs: seeds: should be a list"),
        ({"runs": [{"method": ["DWP"]}]}, "runs: 'method' is not one of methods, n, seeds"),
        ({"runs": [{"methods": ["PR"], "n": [5], "seeds": [0]}]}, "runs: 'PR' is not one of the methods (DWP"),
        ({"runs": [{"methods": ["DWP"], "n": ["x"], "seeds": [0]}]}, "runs: n: expected a whole number"),
        ({"runs": [{"methods": ["DWP"], "n": [5], "seeds": [-1]}]}, "runs: seed: must be at least 0"),
        ({"evaluate": "train"}, "evaluate: 'train' is not one of test, validation"),
        ({"samples": -1}, "samples: must be at least 0"),
        ({"reference": "PR"}, "reference: 'PR' is not one of the methods"),
    ],
)
def test_invalid_studies_raise_an_error_that_names_the_entry(read, tmp_path, content, says):
    with pytest.raises(ConfigError) as caught:
        read(**content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'study.yaml'}: ") and says in message and "\n" not in message


@pytest.mark.parametrize(("name", "runs"), [("gliomas", 21), ("hippocampus", 9), ("ms", 9), ("likelihoods", 12)])
def test_the_examples_of_the_documents(name, runs):
    study = Study.read(Path(__file__).parents[2] / "studies" / "network" / f"{name}.yaml")
    assert len(study.runs) == runs
