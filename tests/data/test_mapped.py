"""Examples in memory-mapped files: equal, without a trace in the file system, and not in the process's memory."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from torch.testing import assert_close

from dwp_pyro.data.mapped import mapped
from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.data.preprocessing import Preprocessing
from dwp_pyro.runtime.errors import RunError


def anonymous_memory() -> float:
    """Return the memory of this process in MiB that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_a_mapped_example_is_equal(scan):
    preprocess = Preprocessing(2.0)
    example = preprocess(scan, [frozenset({2, 4}), frozenset({4})])
    copy = mapped(example)
    for name in ("image", "brain_mask", "label"):
        before, after = getattr(example, name), getattr(copy, name)
        assert after.dtype == before.dtype
        assert_close(after.as_tensor(), before.as_tensor(), rtol=0, atol=0)
        assert_close(after.affine, before.affine)
    assert all(torch.equal(a, b) for a, b in zip(example.indices, copy.indices, strict=True))
    patches, again = (PatchDataset([each], (8, 8, 8), 0, 3) for each in (example, copy))
    assert all(torch.equal(a, b) for n in range(3) for a, b in zip(patches[n], again[n], strict=True))
    maps = [preprocess.invert(each.label.as_tensor(), each, scan) for each in (example, copy)]
    assert (maps[0] == maps[1]).all()


def test_an_example_without_label_or_voxels_of_a_region(scan):
    preprocess = Preprocessing(None)
    assert mapped(preprocess(scan, ())).label is None
    empty = mapped(preprocess(scan, [frozenset({77})]))
    assert len(empty.indices[1]) == 0 and not empty.label.any()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc, which tells the memory of a process")
def test_a_mapped_example_uses_no_memory_and_leaves_no_file(scan, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    example = Preprocessing(None)(scan, [frozenset({2, 4})])
    large = dataclasses.replace(example, image=MetaTensor(torch.rand(1, 400, 400, 400)))  # 244 MiB
    before = anonymous_memory()
    copy = mapped(large)
    del large
    mapped(example)  # returns the freed memory of earlier ones to the system
    total = float(copy.image.as_tensor().sum())
    assert anonymous_memory() < before - 200
    assert total == pytest.approx(32e6, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(scan, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    example = Preprocessing(None)(scan, [frozenset({2, 4})])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=f"{tmp_path}: cannot be written .*free some space"):
            mapped(example)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
