"""Test cases that the source networks have seen."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from dwp_pyro.config.training import FinetuneConfig, SviConfig
from dwp_pyro.data.split import Split
from dwp_pyro.training.target import _warn_of_seen_test_cases


@pytest.mark.parametrize(
    ("root", "config", "warned"),
    [
        ("data", SviConfig, True),
        ("elsewhere", SviConfig, False),
        ("data", FinetuneConfig, False),  # from a random start
        ("data", partial(SviConfig, prior="normal", blocks="prior/blocks.yaml"), False),
    ],
)
def test_test_cases_that_trained_the_source_networks_are_a_warning(root, config, warned, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prior").mkdir()
    Path("prior/config.yaml").write_text("root: data\n")
    Path("prior/split.json").write_text(json.dumps({"train": ["a", "b"], "validation": ["c"], "test": ["d"]}))
    split = Split(train=("a",), validation=(), test=("b", "c", "d", "e"))
    _warn_of_seen_test_cases(config(root=root, prior_dir="prior"), split)
    assert ("prior learned from 2 of the 4 test cases, for example 'b'" in caplog.text) == warned


@pytest.mark.parametrize("damaged", ["{}", 'root: "\\0"', "root: [1]", "root: loop", "{", "[]"])
def test_a_damaged_description_of_the_sources_does_not_stop_the_training(damaged, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prior").mkdir()
    Path("loop").symlink_to("loop")
    Path("prior/config.yaml").write_text(damaged)
    _warn_of_seen_test_cases(SviConfig(root="data", prior_dir="prior"), Split(train=("a",), validation=(), test=("b",)))
    assert not caplog.text
