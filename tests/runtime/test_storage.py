"""Atomic writes of files; a run folder holds one run and admits one process."""

import json

import pytest
import safetensors.torch
import torch

from dwp_pyro.runtime.errors import FolderLocked, RunError, RunOutdated, RunUnfinished
from dwp_pyro.runtime.files import atomic_path, locked, new_folder, read_json, write_json
from dwp_pyro.runtime.run_folder import RunFolder, check_pinned
from dwp_pyro.runtime.tensors import fill_module, load_tensors, save_tensors

CONFIG = {"seed": 0, "widths": [1, 2]}


def start(path, command="svi", config=CONFIG, resume=False, overwrite=False):
    return RunFolder.start(path, command, config, resume=resume, overwrite=overwrite)


def test_a_failed_write_keeps_the_old_content_and_leaves_no_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise ValueError("stop")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_metadata_round_trip(tmp_path):
    tensors = {"a.b": torch.randn(2, 3), "step": torch.tensor(7)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"n": [1, 2]})
    loaded, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"n": [1, 2]}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("damage", ["missing", "truncated", "nan", "pickle"])
def test_damaged_tensors_are_named(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "nan":
        safetensors.torch.save_file({"a": torch.full((100,), float("nan"))}, path)
    elif damage == "pickle":
        torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(RunError, match="t.safetensors") as caught:
        load_tensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_not_written(tmp_path, value):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(RunError, match="'b' holds NaN or infinity"):
        save_tensors(path, {"a": torch.zeros(2), "b": torch.tensor([0.0, value])})
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(2))


def test_every_flipped_bit_is_detected_or_harmless(tmp_path):
    """Flip each bit of a file: loading fails, or the content is the same."""
    path = tmp_path / "t.safetensors"
    tensors = {"mean": torch.randn(2, 3), "half": torch.zeros(3, dtype=torch.bfloat16), "step": torch.tensor(7)}
    save_tensors(path, tensors | {"empty": torch.zeros(0, 2)}, {"n": [1, 2]})
    whole = path.read_bytes()
    detected = 0
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            loaded, metadata = load_tensors(path)
        except RunError as problem:
            assert str(problem).startswith(f"{path}: ") and "\n" not in str(problem)
            detected += 1
        else:
            assert metadata == {} or metadata["n"] == [1, 2]  # without metadata, readers refuse the missing format
            assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert detected > 0.97 * 8 * len(whole)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    for name in "abcdefgh":
        save_tensors(tmp_path / name, {"b": torch.ones(2), "a": torch.zeros(3)}, {"n": [1, 2], "m": {"x": 0.1}})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_files_without_a_checksum_are_read(tmp_path):
    """Other programs and older versions write no checksum."""
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")[0]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"weight": torch.ones(2, 3, dtype=torch.float16)}, "'weight' holds torch.float16, not torch.float32"),
        ({"weight": torch.ones(2, 3, dtype=torch.int32)}, "'weight' holds torch.int32"),
        ({"weight": torch.ones(3, 2)}, "size mismatch"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "bias"),
        ({}, "weight"),
    ],
)
def test_a_module_accepts_only_its_own_tensors(tensors, says):
    with pytest.raises(ValueError, match=says):
        fill_module(torch.nn.Linear(3, 2, bias=False), tensors)


def test_json_without_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("inf")]})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [1.5, None]}


def test_a_finished_run_is_refused_and_overwritten_on_demand(tmp_path):
    with start(tmp_path / "r") as run:
        (run.path / "result").write_text("first")
        run.record(summary=1)
    with pytest.raises(RunError, match="finished run"), start(tmp_path / "r"):
        pass
    assert (tmp_path / "r" / "result").exists()
    with start(tmp_path / "r", overwrite=True) as run:
        assert not (run.path / "result").exists()
    # Nothing of the run before, nor of its deletion.
    assert json.loads((tmp_path / "r" / "run.json").read_text()) == {"format": 1, "command": "svi", "finished": True}


def test_a_run_depends_on_what_it_has_pinned(tmp_path):
    with start(tmp_path / "r") as run:
        run.pin("split.json", {"train": ("a", "b"), "test": ("c",)})
        run.pin("split.json", {"train": ["a", "b"], "test": ["c"]})
        for other in (
            {"train": ["a"], "test": ["c"]},
            {"train": ["a", "b"]},
            {"train": ["a", "b"], "test": ["c"], "d": 1},
        ):
            with pytest.raises(RunOutdated, match=r"split\.json: cannot continue"):
                run.pin("split.json", other)
        check_pinned(run.path / "split.json", {"test": ["c"]})


def test_a_run_is_not_overwritten_while_its_scans_are_predicted(tmp_path):
    with start(tmp_path / "r"):
        pass
    refused = pytest.raises(FolderLocked, match="predictions: another")
    with locked(tmp_path / "r" / "predictions"), refused, start(tmp_path / "r", overwrite=True):
        pass
    assert read_json(tmp_path / "r" / "run.json")["finished"]


def test_an_unfinished_run_asks_for_resume_with_the_same_settings(tmp_path):
    with pytest.raises(KeyboardInterrupt), start(tmp_path / "r") as run:
        run.record(summary=1)
        raise KeyboardInterrupt
    with pytest.raises(RunUnfinished, match="unfinished run"), start(tmp_path / "r"):
        pass
    with (
        pytest.raises(RunError, match=r"\(seed was 0\)"),
        start(tmp_path / "r", config=CONFIG | {"seed": 1}, resume=True),
    ):
        pass
    with (
        pytest.raises(RunOutdated, match="of another version, with settings depth"),
        start(tmp_path / "r", config=CONFIG | {"depth": 9}, resume=True),
    ):
        pass
    with start(tmp_path / "r", resume=True):
        pass
    state = json.loads((tmp_path / "r" / "run.json").read_text())
    assert state["finished"] and state["summary"] == 1


def test_a_run_is_held_by_one_process(tmp_path):
    with start(tmp_path / "r"), pytest.raises(RunError, match="another process"), start(tmp_path / "r", resume=True):
        pass


@pytest.mark.parametrize(
    ("prepare", "options", "says"),
    [
        (lambda path: path.write_text("x"), {}, "is a file"),
        (lambda path: (path.mkdir(), (path / "thesis.tex").touch()), {}, "holds files that are not a run"),
        (
            lambda path: (path.mkdir(), (path / "thesis.tex").touch()),
            {"overwrite": True},
            "holds files that are not a run",
        ),
        (lambda path: None, {"resume": True}, "no run to resume"),
        (lambda path: None, {"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_what_is_not_a_run_is_refused_and_untouched(tmp_path, prepare, options, says):
    path = tmp_path / "r"
    prepare(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=says), start(path, **options):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_the_run_of_another_command_is_refused(tmp_path):
    with start(tmp_path / "r", command="fit-prior"):
        pass
    with pytest.raises(RunError, match="a run of 'fit-prior'"), start(tmp_path / "r", overwrite=True):
        pass


def test_a_new_folder_is_written_atomically(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(KeyError), new_folder(path) as temporary:
        (temporary / "half").write_text("half")
        raise KeyError
    assert not path.exists() and not list(path.parent.iterdir())
    path.mkdir()  # an empty folder may be replaced
    with new_folder(path) as temporary:
        (temporary / "whole").write_text("whole")
        assert not list(path.iterdir())
    assert [file.read_text() for file in path.parent.rglob("*") if file.is_file()] == ["whole"]
    with pytest.raises(RunError, match="folder: exists already"), new_folder(path):
        pass
