"""Test cases that the source networks have seen."""

from __future__ import annotations

import json
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
