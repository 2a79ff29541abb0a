"""Untrusted files run no code, allocate little memory, stay in the output folder and add no script to a report."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import re
import struct
from dataclasses import asdict, replace
from importlib.metadata import requires
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement

import dwp_pyro
from dwp_pyro.data.case import read_volume
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.runtime.errors import DataError, PriorError, RunError, UserError
from dwp_pyro.runtime.files import read_json, read_yaml
from dwp_pyro.runtime.tensors import load_tensors, save_tensors
from tests.world import SVI_RUN

ROOT = Path(__file__).parents[2]
PACKAGE = Path(dwp_pyro.__file__).parent


class MaliciousPickle:
    """Object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write_malicious_files(folder: Path, marker: Path) -> None:
    bad = pickle.dumps(MaliciousPickle(marker))
    for name in ("a.safetensors", "a.json", "a.yaml", "a.npy", "a.nii.gz", "a.nii"):
        (folder / name).write_bytes(bad)
    torch.save({"a": MaliciousPickle(marker)}, folder / "torch.safetensors")
    np.save(folder / "object.npy", np.array([MaliciousPickle(marker)], dtype=object), allow_pickle=True)
    touch = f'!!python/object/apply:os.system ["touch {marker}"]'
    (folder / "code.yaml").write_text(f"root: {touch}\n")
    (folder / "code.json").write_text(touch)


def test_reading_runs_no_code(tmp_path):
    marker = tmp_path / "executed"
    write_malicious_files(tmp_path, marker)
    readers = {".safetensors": load_tensors, ".json": read_json, ".yaml": read_yaml, ".npy": read_kernels}
    readers[".gz"] = read_volume
    files = [path for path in tmp_path.iterdir() if path.suffix != ".nii"]
    assert len(files) == 9
    for path in files:
        with pytest.raises(UserError, match=re.escape(path.name)):
            readers[path.suffix](path)
    with pytest.raises(DataError):
        read_volume(tmp_path / "a.nii")
    assert not marker.exists()
    pickle.loads(pickle.dumps(MaliciousPickle(marker)))  # the pickle itself works
    assert marker.exists()


@pytest.mark.parametrize(
    ("shape", "dtype", "suffix", "message"),
    [
        ((30_000, 30_000, 30_000), np.int16, ".nii", "states 27,000,000,000,000 voxels"),
        ((30_000, 30_000, 30_000), np.int16, ".nii.gz", "states 27,000,000,000,000 voxels"),
        ((1100, 1000, 1000), np.uint8, ".nii.gz", "holds 1,100,000,000 voxels, more than 1,000,000,000"),
    ],
)
def test_the_size_in_a_header_is_checked_before_memory_is_allocated(tmp_path, shape, dtype, suffix, message):
    """The last file is a decompression bomb that holds every voxel of its header in some megabytes."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    path = tmp_path / f"a{suffix}"
    content = header.binaryblock + b"\0" * 4
    if suffix == ".nii.gz":
        content = gzip.compress(content)
    if "holds" in message:
        content += gzip.compress(b"\0" * 2**27, 1) * 10
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_volume(path)


@pytest.mark.parametrize("length", [0, 100, 2**40, 2**63, 2**64 - 1])
def test_tensor_headers_of_wrong_length_are_refused(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(RunError, match=r"a.safetensors: is damaged"):
        load_tensors(path)


@pytest.mark.parametrize("offsets", [[0, 2**50], [2**50, 2**50 + 8], [-8, 0], [8, 0]])
def test_tensors_outside_the_file_are_refused(tmp_path, offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(RunError, match=r"a.safetensors: is damaged"):
        load_tensors(path)


def test_the_expansion_of_aliases_is_limited(tmp_path):
    path = tmp_path / "a.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for text in ("\n".join(lines), "a: &a [*a]"):
        path.write_text(text)
        with pytest.raises(RunError, match=r"a.yaml: its aliases expand to more than 100,000 values"):
            read_yaml(path)
    path.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(path) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["!!bool x", "!!map [1]", "!!set [b]", "!!timestamp x", "!!int ''"])
def test_values_that_do_not_fit_their_tags_are_refused(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: {text}")
    with pytest.raises(RunError, match=r"a.yaml: is not valid YAML"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel_shape", [3, 30_000, 30_000]),
        ("form", {"latent_size": 10**9, "hidden": [32]}),
        ("form", {"latent_size": 8, "hidden": [10**6] * 9}),
    ],
)
def test_a_prior_of_terabytes_is_refused(copy_of_world, key, value):
    path = Path("runs/prior-ms/prior.json")
    description = json.loads(path.read_text())
    next(iter(description["blocks"].values()))[key] = value
    path.write_text(json.dumps(description))
    with pytest.raises(PriorError, match=r"prior.json: is not a kernel prior's description.*exceed the limits"):
        KernelPrior.load(path.parent)


def change_network_config(path: Path, **fields: object) -> None:
    posterior = Posterior.load(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | {"network": asdict(replace(posterior.network_config, **fields))})


@pytest.mark.parametrize(
    "fields",
    [
        {"widths": (10**7, 10**7, 10**7, 10**7)},
        {"regions": ("../../whole",)},
        {"regions": ("$__import__('os').system('true')",)},
        {"modalities": ("$__import__('os').system('true')",)},
        {"modalities": ("@bundle_root",)},
        {"layout": "../brats"},
    ],
    ids=str,
)
def test_a_posterior_cannot_name_paths_or_code(copy_of_world, fields):
    """Regions are parts of file names; MONAI evaluates the values in a bundle that begin with $."""
    path = Path(SVI_RUN, "posterior.safetensors")
    change_network_config(path, **fields)
    with pytest.raises(RunError, match="does not hold a network of this version"):
        Posterior.load(path)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b", ".hidden", "a\0b", "a\nb", "..", ""])
def test_a_case_cannot_leave_the_output_folder(tmp_path, name):
    (tmp_path / "scan.nii.gz").touch()
    manifest = tmp_path / "scans.csv"
    manifest.write_text(f'id,flair\n"{name}",scan.nii.gz\n')
    with pytest.raises(DataError, match="scans.csv"):
        open_dataset(manifest)


def test_a_case_id_like_an_option_or_a_script_is_plain_text(command, copy_of_world):
    """Check file names and the report."""
    scans, labels = (sorted(Path("data/brats").rglob(f"*_{kind}.nii.gz")) for kind in ("flair", "seg"))
    ids = ["--out", "<script>alert(1)<", '"><img src=x onerror=alert(2)>']
    ids += ["c0", "c1", "c2"]
    with open("scans.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "flair", "label"), *zip(ids, scans, labels, strict=False)])
    split = {"train": ["c0", "c1"], "validation": ["c2"], "test": ids[:3]}
    Path("split.json").write_text(json.dumps(split))
    tiny = ("--widths", "2,3,4,5", "--patch", "24", "--validation", "1", "--steps", "2")
    source = ("--root", "scans.csv", "--split", "split.json", "--label-map", "1=oedema,2=necrosis,4=enhancing")
    assert command("finetune", *source, "--n", 2, *tiny, "--out", "runs/odd").exit_code == 0
    for step in (("evaluate", "runs/odd", "--samples", 1), ("report", "runs/odd")):
        result = command(*step)
        assert result.exit_code == 0, result.output
    page = Path("runs/odd/report.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    written = {path.name for path in Path("runs/odd/predictions").iterdir()}
    assert {f"{id_}_seg.nii.gz" for id_ in ids[:3]} <= written


def test_the_tested_versions_are_the_ends_of_the_ranges():
    """constraints.txt pins the newest and constraints-oldest.txt the lowest versions that pyproject.toml allows."""

    def versions(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        pinned = [line.partition(" ")[0].split("==") for line in lines if line and not line.startswith("#")]
        return {package.lower().replace("_", "-"): version for package, version in pinned}

    newest, oldest = versions("constraints.txt"), versions("constraints-oldest.txt")
    requirements = [Requirement(line) for line in requires("dwp-pyro") or () if "extra" not in line]
    assert len(requirements) >= 13
    for requirement in requirements:
        (lowest,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        assert requirement.specifier.contains(newest[requirement.name]), requirement
        assert any(spec.operator == "<" for spec in requirement.specifier), f"{requirement}: has no upper bound"
        if requirement.name != "torch":
            assert oldest[requirement.name].startswith(lowest), requirement
        assert requirement.specifier.contains(oldest[requirement.name]), requirement


def test_no_module_writes_files_in_place():
    """The exceptions replace whole files or folders, append lines, or write to a scratch folder."""
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    opened = {name for name, text in texts.items() if re.search(r"""open\([^)]*["'][wax]b?["']""", text)}
    assert opened <= {"runtime/files.py", "training/metrics_log.py"}
    writes = r"\.write_(text|bytes)\(|\b(nib|nibabel|np)\.save|\.savefig\("
    written = {name for name, text in texts.items() if re.search(writes, text)}
    others = {"prediction/outputs.py", "data/phantom.py", "plots/style.py", "runtime/distributed.py"}
    assert written == {"runtime/files.py"} | others


def test_settings_are_written_without_aliases(in_world):
    for path in Path("runs").rglob("*.yaml"):
        assert "&id" not in path.read_text() and yaml.safe_load(path.read_text()), os.fspath(path)
