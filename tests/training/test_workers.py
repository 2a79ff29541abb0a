"""Workers read the scans again."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from dwp_pyro.data.split import Split
from dwp_pyro.runtime.errors import OutOfMemory, RunOutdated
from dwp_pyro.runtime.files import write_json
from dwp_pyro.training import source_networks, target

ARGUMENTS = {source_networks: ("bootstrap0",), target: ("svi", "svi")}


@pytest.mark.parametrize("module", ARGUMENTS)
def test_a_worker_with_another_split_than_its_command_stops(module, tmp_path, monkeypatch):
    """A patient added meanwhile moves the roles of the others."""
    write_json(tmp_path / "split.json", asdict(Split(("a",), ("b",), ("c",))))
    data = SimpleNamespace(split=Split(("c",), ("b",), ("a",)))
    monkeypatch.setattr(module, "load_training_data", lambda *_: data)
    config = SimpleNamespace(n=1)
    settings = config if module is source_networks else SimpleNamespace(config=config)
    with pytest.raises(RunOutdated, match=r"split\.json: cannot continue, because the scans, the split"):
        module._train_in_worker(settings, tmp_path, "cpu", *ARGUMENTS[module])


@pytest.mark.parametrize("module", ARGUMENTS)
def test_a_worker_without_memory_for_the_scans_is_one_line(module, tmp_path, monkeypatch):
    def load(*_):
        raise MemoryError

    monkeypatch.setattr(module, "load_training_data", load)
    config = SimpleNamespace(n=1)
    settings = config if module is source_networks else SimpleNamespace(config=config)
    with pytest.raises(OutOfMemory, match="the device ran out of memory"):
        module._train_in_worker(settings, tmp_path, "cpu", *ARGUMENTS[module])


def test_a_worker_with_other_unlabelled_scans_than_its_command_stops(tmp_path, monkeypatch):
    split = Split(("a",), ("b",), ("c",))
    write_json(tmp_path / "split.json", asdict(split) | {"unlabelled": ["d"]})
    monkeypatch.setattr(target, "load_training_data", lambda *_: SimpleNamespace(split=split))
    monkeypatch.setattr(target, "find_unlabelled", lambda *_: SimpleNamespace(cases=[SimpleNamespace(id="e")]))
    method = SimpleNamespace(config=SimpleNamespace(n=1), command="svi", evidence=1.0)
    with pytest.raises(RunOutdated):
        target._train_in_worker(method, tmp_path, "cpu", "svi-student", "svi-student")
