"""Study files: the order of their cells, whose settings win, and what is refused."""

from pathlib import Path

import pytest
import yaml

from dwp_pyro.config import FinetuneConfig, SviConfig
from dwp_pyro.errors import ConfigError
from dwp_pyro.pipeline.study import Study

ARMS = {
    "DWP": {"command": "svi", "prior": "dwp"},
    "UNet-RI": {"command": "finetune", "init": "random", "learning-rate": 0.004},
}
CELLS = [{"arms": ["DWP", "UNet-RI"], "n": [5, 10], "seeds": [0, 1]}]


@pytest.fixture
def read(tmp_path: Path):
    def make(**content) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"arms": ARMS, "cells": CELLS} | content, sort_keys=False))
        return Study.read(path)

    return make


def test_all_arms_come_before_the_next_n_and_every_n_before_the_next_seed(read):
    more = [*CELLS, {"arms": ["DWP"], "n": [5], "seeds": [1, 7]}]
    assert [cell.key for cell in read(cells=more).cells] == [
        (arm, n, seed) for seed in (0, 1) for n in (5, 10) for arm in ("DWP", "UNet-RI")
    ] + [("DWP", 5, 7)]


def test_an_arms_own_settings_win_over_shared_ones(read):
    shared = {"steps": 7, "learning-rate": 0.001, "batch_size": 2, "init-scale": 0.02}
    dwp, unet, *_ = read(settings=shared).cells
    assert dwp.config == SviConfig(steps=7, learning_rate=0.001, batch_size=2, init_scale=0.02)
    assert unet.config == FinetuneConfig(steps=7, learning_rate=0.004, batch_size=2)


def test_defaults(read):
    study = read()
    assert (study.evaluate, study.samples, study.reference) == ("test", 10, None)


def test_the_names_of_files_are_safe(read):
    arms = {"β / 2": {"command": "svi", "evidence": 0.5}}
    (cell,) = read(arms=arms, cells=[{"arms": ["β / 2"], "n": [5], "seeds": [3]}]).cells
    assert cell.name == "β-2-n5-seed3" and str(cell) == "β / 2, n 5, seed 3"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"sample": 3}, "study: 'sample' is not one of arms, cells,"),
        ({"settings": {"stepz": 3}}, "settings: 'stepz' is not one of"),
        ({"settings": {"seed": 3}}, "settings: 'seed' is not one of"),
        ({"settings": {"steps": 0}}, "arm 'DWP': steps: must be at least 1"),
        ({"settings": 3}, "settings: should hold"),
        ({"arms": None}, "arms: should hold"),
        ({"arms": {"DWP": {"prior": "dwp"}}}, "arm 'DWP': 'command' should be one of svi, finetune, got None"),
        ({"arms": {"DWP": {"command": "svi", "train": "all"}}}, "arm 'DWP': 'train' is no setting"),
        ({"arms": {"DWP": {"command": "svi", "n": 3}}}, "arm 'DWP': 'n' belongs into the cells"),
        ({"arms": {"a b": ARMS["DWP"], "A-b": ARMS["DWP"]}}, "arm 'a b': another arm would have the same file names"),
        ({"cells": []}, "cells: should be a list"),
        ({"cells": [{"arms": ["DWP"], "n": 5, "seeds": [0]}]}, "cells: n: should be a list"),
        ({"cells": [{"arms": ["DWP"], "n": [5]}]}, "cells: seeds: should be a list"),
        ({"cells": [{"arm": ["DWP"]}]}, "cells: 'arm' is not one of arms, n, seeds"),
        ({"cells": [{"arms": ["PR"], "n": [5], "seeds": [0]}]}, "cells: 'PR' is not one of the arms (DWP, UNet-RI)"),
        ({"cells": [{"arms": ["DWP"], "n": ["x"], "seeds": [0]}]}, "cells: n: expected a whole number"),
        ({"cells": [{"arms": ["DWP"], "n": [5], "seeds": [-1]}]}, "cells: seed: must be at least 0"),
        ({"evaluate": "train"}, "evaluate: 'train' is not one of test, validation"),
        ({"samples": -1}, "samples: must be at least 0"),
        ({"reference": "PR"}, "reference: 'PR' is not one of the arms"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(read, tmp_path, content, says):
    with pytest.raises(ConfigError) as caught:
        read(**content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'study.yaml'}: ") and says in message and "\n" not in message


@pytest.mark.parametrize(("name", "cells"), [("gliomas", 21), ("hippocampus", 9), ("ms", 9), ("likelihoods", 12)])
def test_the_examples_of_the_documents(name, cells):
    study = Study.read(Path(__file__).parents[2] / "studies" / "network" / f"{name}.yaml")
    assert len(study.cells) == cells
