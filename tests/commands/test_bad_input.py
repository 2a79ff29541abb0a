"""Bad input: one line with cause and remedy, exit code 2, no new files, no lost files.

A row of the table damages a copy of the world, names the commands to call and parts of their error line. Rows
without these parts have unusual but valid input, which must work.
"""

import gzip
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
import torch
import yaml

from dwp_pyro.runtime.tensors import load_tensors, save_tensors
from tests.world import SVI_RUN, TINY, error_line

POSTERIOR = f"{SVI_RUN}/posterior.safetensors"
CASE = "data/brats/HGG/Brats18_PHA_00{0}_1/Brats18_PHA_00{0}_1_{1}.nii.gz"
FLAIR, T1, SEG = (CASE.format(1, kind) for kind in ("flair", "t1", "seg"))
ALL_CASES = range(1, 10)

Damage = Callable[[], Any]

#: Commands by name; rows may have others.
COMMANDS = {
    "check-data": ("check-data", "--dataset", "brats", "--modality", "flair"),
    "svi": ("svi", "--n", 2, *TINY, "--members", 1, "--out", "runs/new"),
    "svi alone": ("svi", "--n", 2, *TINY, "--center", "none", "--out", "runs/new"),
    "finetune": ("finetune", "--n", 2, *TINY, "--out", "runs/new"),
    "finetune source": ("finetune", "--n", 2, "--init", "source", *TINY, "--out", "runs/new"),
    "predict": ("predict", SVI_RUN, "data/brats", "--samples", 1, "--out", "new"),
    "predict one": ("predict", SVI_RUN, FLAIR, "--samples", 1, "--out", "new"),
    "evaluate": ("evaluate", SVI_RUN, "--samples", 1),
    "report": ("report", SVI_RUN),
    "export": ("export", SVI_RUN, "new", "--format", "monai-bundle"),
    "fit-prior": ("fit-prior", "--dataset", "brats", *TINY, "--out", "runs/new"),
    "fit-prior bank": (
        "fit-prior",
        "--kernels",
        "runs/prior-ms/kernels.safetensors",
        "--density-steps",
        2,
        "--out",
        "new",
    ),
    "fit-prior array": ("fit-prior", "--kernels", "k.npy", "--density-steps", 2, "--out", "new"),
    "score-prior": ("score-prior", "runs/prior-ms", "--kernels", "runs/prior-ms/kernels.safetensors"),
    "inspect-prior": ("inspect-prior", "runs/prior-ms", "--out", "new"),
    "experiment": ("experiment", "study.yaml", "--out", "new"),
}
ON_SCANS = ("check-data", "svi", "finetune", "predict", "evaluate", "fit-prior")
ON_LABELS = ("check-data", "svi", "finetune", "evaluate", "fit-prior")
ON_PRIORS = ("svi", "score-prior", "inspect-prior")
ON_POSTERIORS = ("predict", "evaluate", "export")


class Row(NamedTuple):
    """Case of bad input.

    Args:
        name: Description of the damage.
        damage: Function that damages the current folder.
        commands: Keys of `COMMANDS`, or arguments; each is called.
        phrases: Parts of the error line, with cause and remedy; None if the command must succeed.
    """

    name: str
    damage: Damage
    commands: tuple[Any, ...]
    phrases: tuple[str, ...] | None


# --- Damages ----------------------------------------------------------------------------------------------------------


def nothing() -> None:
    """Change nothing: only the arguments are bad."""


def each(*damages: Damage) -> Damage:
    return lambda: [damage() for damage in damages]


def content(path: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda: Path(path).write_bytes(change(Path(path).read_bytes()))


def text(path: str, new: str) -> Damage:
    return lambda: Path(path).write_text(new)


def header(path: str, offset: int, format_: str, *values: float) -> Damage:
    """Overwrite fields of a NIfTI header."""

    def change(whole: bytes) -> bytes:
        plain = bytearray(gzip.decompress(whole))
        struct.pack_into("<" + format_, plain, offset, *values)
        return gzip.compress(plain)

    return content(path, change)


def voxels(path: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return image(path, lambda data, affine: (change(data), affine))


def image(path: str, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Damage:
    def damage() -> None:
        loaded = nibabel.load(path)
        data, affine = change(np.asarray(loaded.dataobj).copy(), loaded.affine.copy())
        nibabel.save(nibabel.Nifti1Image(data, affine), path)

    return damage


def every_case(kind: str, damage: Callable[[str], Damage]) -> Damage:
    """Damage the same file of every case, whichever a command reads first."""
    return each(*(damage(CASE.format(i, kind)) for i in ALL_CASES))


def tensors(path: str, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Damage:
    """Change tensors or metadata under a valid checksum."""

    def damage() -> None:
        named, description = load_tensors(Path(path))
        change(named, description)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dwp_pyro.runtime.tensors._not_finite", lambda tensors: None)  # by default it rejects NaN
            save_tensors(Path(path), named, description)

    return damage


def fields(path: str, *keys: str | int, value: Any) -> Damage:
    """Change a value in a JSON or YAML file."""

    def damage() -> None:
        is_yaml = Path(path).suffix == ".yaml"
        whole = yaml.safe_load(Path(path).read_text()) if is_yaml else json.loads(Path(path).read_text())
        place = whole
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        Path(path).write_text(yaml.safe_dump(whole) if is_yaml else json.dumps(whole))

    return damage


def without_block() -> None:
    description = json.loads(Path(PRIOR_JSON).read_text())
    del description["blocks"]["input"]
    Path(PRIOR_JSON).write_text(json.dumps(description))


def first(named: dict[str, Any]) -> str:
    return next(name for name, tensor in named.items() if tensor.dim() > 1)


def moved(old: str, new: str) -> Damage:
    return lambda: Path(old).rename(new)


def copied(old: str, new: str) -> Damage:
    def damage() -> None:
        Path(new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(old, new) if Path(old).is_dir() else shutil.copy(old, new)

    return damage


def removed(path: str) -> Damage:
    return lambda: Path(path).unlink()


def linked(path: str, to: str) -> Damage:
    def damage() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(to)

    return damage


def unzipped(path: str) -> None:
    Path(path.removesuffix(".gz")).write_bytes(gzip.decompress(Path(path).read_bytes()))


def shifted(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    affine[2, 3] += 30
    return data, affine


def with_affine(*rows: tuple[float, ...]) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return lambda data, affine: (data, np.array([*rows, (0, 0, 0, 1)], float))


def at_one_voxel(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32)
        data[10, 10, 10] = value
        return data

    return change


def flipped(whole: bytes) -> bytes:
    """Flip the lowest bit of a number, which stays plausible."""
    return whole[:-64] + bytes([whole[-64] ^ 1]) + whole[-63:]


def swap_datasets() -> None:
    Path("data/brats").rename("data/old-brats")
    Path("data/ms").rename("data/brats")
    Path("data/old-brats").rename("data/ms")


def array(*shape: int, change: Callable[[np.ndarray], np.ndarray] = lambda k: k) -> Damage:
    return lambda: np.save("k.npy", change(np.random.default_rng(0).normal(size=shape).astype(np.float32)))


def study(**change: Any) -> Damage:
    methods = {"RI": {"command": "finetune", "init": "random", "steps": 1, "validation": 1}}
    whole = {"methods": methods, "runs": [{"methods": ["RI"], "n": [1], "seeds": [0]}]} | change
    return lambda: Path("study.yaml").write_text(yaml.safe_dump(whole))


# --- The table --------------------------------------------------------------------------------------------------------

SCANS = [
    Row("no data", moved("data", "elsewhere"), ON_SCANS, ("data/brats: no such f", "folder of scans")),
    Row("no case", each(lambda: shutil.rmtree("data/brats"), lambda: Path("data/brats").mkdir()), ("check-data", "svi"),
        ("data/brats: holds no case of the layout 'brats'; expected",)),
    Row("another layout", swap_datasets, ("check-data", "svi", "finetune", "evaluate", "fit-prior"),
        ("data/brats: holds no case of the layout 'brats'; expected",)),
    Row("truncated", every_case("flair", lambda path: content(path, lambda whole: whole[:2000])), ON_SCANS,
        ("_flair.nii.gz", "is the file complete?")),
    Row("empty file", text(FLAIR, ""), ("check-data", "predict"), (FLAIR, "is the file complete?")),
    Row("bad gzip", content(FLAIR, lambda whole: whole[:500] + bytes(100) + whole[600:]), ("check-data", "predict"),
        (FLAIR, "is the file complete?")),
    Row("bad checksum of gzip", content(FLAIR, lambda whole: whole[:-8] + bytes(8)), ("check-data", "predict"),
        (FLAIR, "is the file complete?")),
    Row("plain NIfTI named .gz", content(FLAIR, gzip.decompress), ("check-data", "predict"), (FLAIR, "file complete?")),
    Row("wrong magic", header(FLAIR, 344, "4s", b"nope"), ("check-data", "predict"), (FLAIR, "is the file complete?")),
    Row("text instead of an image", text(FLAIR, "<html>404</html>"), ("check-data", "predict"), (FLAIR, "file complete?")),
    Row("header only", content(FLAIR, lambda whole: gzip.compress(gzip.decompress(whole)[:352])),
        ("check-data", "predict"), (FLAIR, "is the file complete?")),
    Row("2D", header(FLAIR, 40, "4h", 2, 28, 32, 1), ("check-data", "predict"),
        (f"{FLAIR}: expected a three-dimensional volume, found 28×32; split or convert it first",)),
    Row("4D", header(FLAIR, 40, "5h", 4, 28, 32, 14, 2), ("check-data", "predict", "predict one"),
        (f"{FLAIR}: expected a three-dimensional volume, found 28×32×14×2; split or convert it first",)),
    Row("one voxel", voxels(FLAIR, lambda data: data[10:11, 10:11, 10:11]), ("check-data", "predict"),
        (f"{FLAIR}: expected a three-dimensional volume, found 1×1×1",)),
    Row("one slice", voxels(FLAIR, lambda data: data[:, :, :1]), ("check-data", "predict"),
        (f"{FLAIR}: expected a three-dimensional volume, found 28×32×1",)),
    Row("NaN", voxels(FLAIR, at_one_voxel(math.nan)), ("check-data", "predict"),
        (f"{FLAIR}: holds NaN or infinite voxels; replace them first",)),
    Row("infinite", voxels(FLAIR, at_one_voxel(-math.inf)), ("check-data", "predict"),
        (f"{FLAIR}: holds NaN or infinite voxels; replace them first",)),
    Row("beyond float32", voxels(FLAIR, lambda data: data * 1e300), ("check-data", "predict"),
        (f"{FLAIR}: holds NaN or infinite voxels; replace them first",)),
    Row("all 0", voxels(FLAIR, np.zeros_like), ("predict",), (f"{FLAIR}: has no voxel above 0",)),
    Row("all below 0", voxels(FLAIR, lambda data: -np.abs(data)), ("check-data", "predict"), None),
    Row("huge header", header(FLAIR, 40, "4h", 3, 30000, 30000, 30000), ("check-data", "predict"),
        (FLAIR, "is the file complete?")),
    Row("negative sides", header(FLAIR, 40, "4h", 3, -28, 32, 28), ("check-data", "predict"),
        (FLAIR, "found -28×32×28")),
    Row("complex numbers", header(FLAIR, 70, "2h", 32, 64), ("check-data", "predict"),
        (f"{FLAIR}: is not a NIfTI image of plain numbers; convert it to .nii.gz first",)),
    Row("affine of 0", header(FLAIR, 252, "2h24x12f", 0, 1, *[0] * 12), ("check-data", "predict"),
        (f"{FLAIR}: its affine is singular or not finite; the header needs repair",)),
    Row("affine of NaN", header(FLAIR, 252, "2h24x12f", 0, 1, *[math.nan] * 12), ("check-data", "predict"),
        (FLAIR, "the header needs repair")),
    Row("sheared affine",
        every_case("flair", lambda path: each(*(
            image(path.replace("flair", kind), with_affine((6, 1, 0, 0), (0, 6, 0, 0), (0, 0.5, 6, 0)))
            for kind in ("flair", "t1", "t1ce", "t2", "seg")))),
        ("check-data", "predict one"), None),
    Row("mask of another shape", every_case("seg", lambda path: voxels(path, lambda data: data[:-1])), ON_LABELS,
        ("_seg.nii.gz: has 27×32×28 voxels", "resample one to the other")),
    Row("shifted mask", every_case("seg", lambda path: image(path, shifted)), ON_LABELS,
        ("_seg.nii.gz: its affine differs", "by up to 30.0 mm; resample or repair one")),
    Row("unused mask in prediction", each(voxels(SEG, lambda data: data[:-1])), ("predict one",), None),
    Row("empty mask", voxels(SEG, np.zeros_like), ("check-data",), None),
    Row("every mask empty", every_case("seg", lambda path: voxels(path, np.zeros_like)), ("svi", "finetune", "fit-prior"),
        ("data/brats: no training case holds any voxel of whole",)),
    Row("fractional labels", every_case("seg", lambda path: voxels(path, lambda data: data * np.float32(0.5))), ON_LABELS,
        ("_seg.nii.gz: label values are not whole numbers", "resampled without 'nearest'?")),
    Row("unknown labels", every_case("seg", lambda path: voxels(path, lambda data: data + np.uint8(7) * (data == 0))),
        ON_LABELS, ("_seg.nii.gz: unknown label value 7", "fix the mask or name the value")),
    Row("negative labels", voxels(SEG, lambda data: -data.astype(np.int16)), ("check-data",),
        (f"{SEG}: unknown label value -", "fix the mask")),
    Row("huge labels", voxels(SEG, lambda data: data * 1e20), ("check-data",),
        (f"{SEG}: unknown label value", "fix the mask")),
    Row("missing modality", every_case("flair", removed), ON_SCANS, ("case Brats18_PHA_00", "has no flair scan")),
    Row("duplicate modality", lambda: unzipped(FLAIR), ("check-data", "predict"),
        (f"{FLAIR}: has the same stem as {Path(FLAIR).name.removesuffix('.gz')}; remove one of the two",)),
    Row("duplicate modality, in capitals", copied(FLAIR, FLAIR.replace("_flair", "_FLAIR")), ("check-data",),
        ("_flair.nii.gz: has the same stem as", "remove one of the two")),
    Row("two cases with one id", copied("data/brats/HGG/Brats18_PHA_001_1", "data/brats/LGG/Brats18_PHA_001_1"),
        ("check-data", "svi", "predict"), ("data/brats: two cases have the id 'Brats18_PHA_001_1'; rename one",)),
    Row("two cases with one id in a table", text("a.csv", f"id,flair\nx,{FLAIR}\nx,{T1}\n"),
        (("check-data", "--root", "a.csv"),), ("a.csv: line 3: id 'x' is a duplicate; rename one",)),
    Row("a table of missing files", text("a.csv", "id,flair\nx,nowhere.nii\n"),
        (("check-data", "--root", "a.csv"), ("predict", SVI_RUN, "a.csv")),
        ("a.csv: line 2: flair nowhere.nii: no such file; paths are relative",)),
    Row("a case id that is a path", text("a.csv", f"id,flair\n../x,{FLAIR}\n"),
        (("predict", SVI_RUN, "a.csv", "--samples", 1),), ("a.csv: the case id '../x' cannot name a file; rename it",)),
    Row("circular links", linked(FLAIR, Path(FLAIR).name), ("check-data", "predict"), (FLAIR, "fix that")),
    Row("a broken link", linked(FLAIR, "gone.nii.gz"), ("check-data", "predict"), (FLAIR, "add it or exclude")),
    Row("a folder instead of a file", each(removed(FLAIR), lambda: Path(FLAIR).mkdir()), ("check-data",),
        ("case Brats18_PHA_001_1: has no flair scan",)),
    Row("a path with spaces and non-ASCII letters",
        each(moved("data/brats", "Ma thèse – 脳 scans"),
             text("Ma thèse – 脳 scans/läsion 1.csv", "id,flair\nJosé Ñ 1,HGG/Brats18_PHA_001_1/"
                  "Brats18_PHA_001_1_flair.nii.gz\n")),
        (("check-data", "--root", "Ma thèse – 脳 scans", "--dataset", "brats"),
         ("check-data", "--root", "Ma thèse – 脳 scans/läsion 1.csv"),
         ("predict", SVI_RUN, "Ma thèse – 脳 scans/läsion 1.csv", "--samples", 1, "--out", "résultats à voir")), None),
    Row("file names in capitals",
        each(*(moved(CASE.format(1, kind), CASE.format(1, kind.upper()).replace(".nii.gz", ".NII.GZ"))
               for kind in ("flair", "t1", "t1ce", "t2", "seg"))),
        ("check-data", ("predict", SVI_RUN, FLAIR.replace("_flair.nii.gz", "_FLAIR.NII.GZ"), "--samples", 1)), None),
]  # fmt: skip

SETTINGS = [
    Row("too few cases", nothing, (("svi", *TINY, "--n", 50, "--out", "new"),), ("50 training patients", "lower n")),
    Row("a missing prior", nothing, (("svi", "--n", 2, *TINY, "--prior-dir", "nowhere", "--out", "new"),),
        ("nowhere", "dwp-pyro fit-prior")),
    Row("an unknown prior", nothing, (("svi", "--prior", "cauchy"),), ("'cauchy' is not one of 'dwp'",)),
    Row("no step", nothing, (("svi", "--steps", 0),), ("steps: must be at least 1, got 0",)),
    Row("text instead of a number", nothing, (("svi", "--steps", "many"),), ("'many' is not a valid integer",)),
    Row("a huge number", nothing, (("svi", "--steps", "9" * 30), ("finetune", "--n", "9" * 300)),
        ("must be a number of at most 1e+15",)),
    Row("a huge network", nothing, (("finetune", "--widths", "1000000000,2,2,2"),), ("widths: must be at most 4096",)),
    Row("not a number", nothing, (("svi", "--learning-rate", "nan"), ("svi", "--evidence", "inf")),
        ("must be a number of at most",)),
    Row("too few numbers", nothing, (("svi", "--widths", "2,3"),), ("widths: must be four numbers, got 2,3",)),
    Row("a negative number", nothing, (("predict", SVI_RUN, "data/brats", "--samples", -1),), ("samples: must be",)),
    Row("an overlap of 1", nothing, (("predict", SVI_RUN, "data/brats", "--overlap", 1),), ("overlap: must",)),
    Row("an unknown option", nothing, (("svi", "--stepz", 3),), ("--stepz",)),
    Row("an unknown modality", nothing, (("svi", "--n", 2, *TINY, "--modality", "pet", "--out", "new"),),
        ("has no pet scan (it has", "choose other modalities")),
    Row("an unknown region", nothing, (("svi", "--n", 2, *TINY, "--region", "lesion", "--out", "new"),),
        ("'lesion' is not one of whole",)),
    Row("an unknown region of the source", nothing, (("fit-prior", *TINY, "--region", "core", "--out", "new"),),
        ("'core' is not one of lesion",)),
    Row("other widths or another network than the source", nothing,
        (("svi", "--n", 2, *TINY, "--init", "source", "--widths", "2,2,2,2", "--out", "new"),
         ("svi", "--n", 2, *TINY, "--network", "paper-unet", "--out", "new")),
        ("runs/prior-ms/source.safetensors: the source network has", "or train without: 'svi --center none'")),
    Row("no such device", nothing, (("svi", "--n", 2, *TINY, "--device", "cuda:9", "--out", "new"),), ("cuda:9",)),
    Row("a missing split", nothing, (("svi", "--n", 2, *TINY, "--split", "nowhere.json", "--out", "new"),),
        ("nowhere.json",)),
    Row("a split of unknown cases", text("s.json", '{"train": ["a"], "test": []}'),
        (("svi", "--n", 1, *TINY, "--split", "s.json", "--out", "new"),),
        ("s.json: case 'a' is not among the scans; fix the file",)),
    Row("a split of other types", text("s.json", '{"train": "a", "test": 5}'),
        (("svi", "--n", 1, *TINY, "--split", "s.json", "--out", "new"),), ("s.json: 'train' should be a list",)),
    Row("nothing to resume", nothing, (("svi", "--n", 2, *TINY, "--resume", "--out", "new"),), ("holds no run to resume",)),
    Row("an existing run", nothing, (("svi", "--n", 2, *TINY, "--out", SVI_RUN),), (SVI_RUN, "--overwrite")),
    Row("a run of another command", nothing,
        (("svi", "--n", 2, *TINY, "--out", "runs/prior-ms", "--overwrite"),), ("runs/prior-ms", "another --out")),
    Row("a folder with other files", nothing, (("finetune", "--n", 2, *TINY, "--out", "data"),
        ("demo", "--out", "runs")), ("holds",)),
    Row("a file instead of a folder", nothing, (("predict", SVI_RUN, "data/brats", "--out", T1),),
        (f"{T1}: is a file, expected a folder; give another --out",)),
    Row("first and last layers without a source", nothing, (("finetune", "--trainable", "first-last"),), ("train", "needs init 'source'")),
    Row("a missing source network", nothing,
        (("finetune", "--n", 2, *TINY, "--init", "source", "--prior-dir", "data", "--out", "new"),),
        ("data/source.safetensors: no source network; run 'dwp-pyro fit-prior'",)),
    Row("a missing prior folder", nothing,
        (("finetune", "--n", 2, *TINY, "--init", "source", "--prior-dir", "nowhere", "--out", "new"),),
        ("nowhere: no such folder; run 'dwp-pyro fit-prior'",)),
    Row("an existing prior", nothing, (("fit-prior", *TINY, "--out", "runs/prior-ms"),), ("runs/prior-ms",)),
    Row("a missing kernel bank", nothing, (("fit-prior", "--kernels", "nowhere.npy", "--out", "new"),), ("nowhere.npy",)),
    Row("a missing run", nothing, (("predict", "nowhere", "data/brats"), ("evaluate", "nowhere"), ("report", "nowhere")),
        ("nowhere: no such run; train one with",)),
    Row("a prior instead of a run", nothing, (("predict", "runs/prior-ms", "data/brats"),), ("runs/prior-ms: is a run of",)),
    Row("missing scans", nothing, (("predict", SVI_RUN, "nowhere.nii.gz"), ("check-data", "--root", "nowhere")),
        ("nowhere", "no such f")),
    Row("no layout", nothing, (("predict", SVI_RUN, "runs"),), ("runs: has none of the known layouts", "in a CSV file")),
    Row("too many files of a case", nothing, (("predict", SVI_RUN, FLAIR, T1),), ("1 file(s) of one case",)),
    Row("scans of another disease", nothing, (("evaluate", SVI_RUN, "--root", "data/ms"),), ("data/ms", "expected")),
    Row("no data set to check", nothing, (("check-data",),), ("--dataset",)),
    Row("phantoms in a folder of scans", nothing, (("phantom", "brats", "data/brats"),), ("data/brats",)),
    Row("a missing prior to score", nothing, (("score-prior", "nowhere", "--kernels", "x.npy"),), ("nowhere",)),
    Row("export over a folder", nothing, (("export", SVI_RUN, "data", "--format", "monai-bundle"),), ("data: exists",)),
]  # fmt: skip


def config(value: str, *phrases: str) -> Row:
    command = ("svi", "--n", 2, *TINY, "--config", "c.yaml", "--out", "new")
    return Row(f"settings: {value[:30]!r} of {len(value)}", text("c.yaml", value), (command,), ("c.yaml: ", *phrases))


CONFIGS = [
    Row("a missing settings file", nothing, (("svi", "--config", "nowhere.yaml"),), ("nowhere.yaml: cannot be read",)),
    config("stepz: 3\n", "'stepz' is not a setting of this command"),
    config("batch_size: 2.5\n", "batch-size: expected a whole number, got 2.5"),
    config("batch_size: [2]\n", "batch-size: expected a whole number, got (2,)"),
    config("batch_size: yes\n", "batch-size: expected a whole number, got True"),
    config("learning_rate: 'fast'\n", "learning-rate: expected a number, got 'fast'"),
    config("learning_rate: .nan\n", "learning-rate: must be a number"),
    config("learning_rate: -.inf\n", "learning-rate: must be a number"),
    config(f"batch_size: {'9' * 400}\n", "batch-size: must be a number of at most"),
    config(f"batch_size: {'9' * 5000}\n", "is not valid YAML"),
    config("prior: cauchy\n", "prior: 'cauchy' is not one of"),
    config("prior: {a: 1}\n", "prior: expected text, got {'a': 1}"),
    config("modality: [flair, flair]\n", "modality: has a duplicate"),
    config("label_map: [1=oedema, 1=necrosis]\n", "label-map: names 1 twice"),
    config("spacing: -1\n", "spacing: must be at least 0"),
    config("mirror: [none, x]\n", "mirror: 'none' excludes other axes"),
    config("- 1\n", "should hold 'name: value' lines"),
    config("a: [\n", "is not valid YAML"),
    config("a: " + "[" * 5000, "is not valid YAML"),
    config("!!python/object/apply:os.system ['touch harm']\n", "is not valid YAML"),
    config("\0\n", "is not valid YAML"),
]


def run_config(value: str, *phrases: str) -> Row:
    damage = text(f"{SVI_RUN}/config.yaml", value)
    return Row(f"settings of a run: {value[:30]!r}", damage, ("evaluate",), (f"{SVI_RUN}/config.yaml: ", *phrases))


RUNS = [
    *(run_config(value) for value in ("- 1", "5", "a: [")),
    *(run_config(value, "train it again") for value in ("", "root: 5\ndataset: brats\n", "root: data/brats\n")),
    run_config("{root: data/brats, dataset: brats, label_map: [x]}", "label-map"),
    Row("a run whose scans moved", moved("data/brats", "elsewhere"), ("evaluate",), ("data/brats", "expected a folder")),
    Row("a run without its split", removed(f"{SVI_RUN}/split.json"), ("evaluate",), (f"{SVI_RUN}/split.json",)),
    Row("a truncated split of a run", content(f"{SVI_RUN}/split.json", lambda whole: whole[:30]), ("evaluate",),
        (f"{SVI_RUN}/split.json: is not valid JSON",)),
    Row("a split of a run with unknown cases", fields(f"{SVI_RUN}/split.json", "test", value=["x"]), ("evaluate",),
        (f"{SVI_RUN}/split.json", "has no case 'x'")),
    Row("a split of a run without test cases", fields(f"{SVI_RUN}/split.json", "test", value=[]), ("evaluate",),
        (f"{SVI_RUN}/split.json: names no test cases",)),
    Row("a run without evaluation", nothing, ("report",), (f"{SVI_RUN}: is not evaluated yet; run",)),
    Row("an evaluation in another format", text(f"{SVI_RUN}/evaluation.json", '{"regions": []}'), ("report",),
        (f"{SVI_RUN}/evaluation.json: is not an evaluation of this version; run",)),
    Row("a truncated state of a run", text(f"{SVI_RUN}/run.json", '{"format":'),
        (("svi", "--n", 2, *TINY, "--members", 2, "--resume", "--out", SVI_RUN),), (f"{SVI_RUN}/run.json: is not valid",)),
    Row("a run resumed with other settings",
        each(fields(f"{SVI_RUN}/run.json", "finished", value=False), fields(f"{SVI_RUN}/config.yaml", "evidence", value=2.0)),
        (("svi", "--prior", "dwp", "--n", 2, *TINY, "--members", 2, "--resume", "--out", SVI_RUN),),
        (f"{SVI_RUN}: cannot resume with other settings (evidence was 2.0); resume with what",)),
    Row("a study without methods", study(methods={}), ("experiment",), ("study.yaml: ",)),
    Row("a study of unknown methods", study(runs=[{"methods": ["x"], "n": [1], "seeds": [0]}]), ("experiment",),
        ("study.yaml: runs: 'x' is not one of the methods (RI)",)),
    Row("a study with a list as command", study(methods={"RI": {"command": ["svi"]}}), ("experiment",),
        ("study.yaml: method 'RI': 'command' should be one of svi, finetune",)),
    Row("a study with a list as reference", study(reference=["RI"]), ("experiment",), ("study.yaml: reference: ",)),
    Row("a study with text as n", study(runs=[{"methods": ["RI"], "n": ["five"], "seeds": [0]}]), ("experiment",),
        ("study.yaml: runs: n: expected a whole number, got 'five'",)),
    Row("blocks without one kernel", text("b.yaml", "input: [input]\n"),
        (("svi", "--n", 2, *TINY, "--blocks", "b.yaml", "--out", "new"),), ("b.yaml: kernel", "is in no block")),
    Row("blocks that are not lists", text("b.yaml", "input: 5\n"),
        (("svi", "--n", 2, *TINY, "--blocks", "b.yaml", "--out", "new"),), ("b.yaml: 'input' must be a list",)),
]  # fmt: skip

PRIOR, PRIOR_JSON = "runs/prior-ms/prior.safetensors", "runs/prior-ms/prior.json"
BANK, BANK_JSON = "runs/prior-ms/kernels.safetensors", "runs/prior-ms/kernels.json"
SOURCE = "runs/prior-ms/source.safetensors"
DAMAGED = {
    "truncated": lambda whole: whole[:-64],
    "empty": lambda whole: b"",
    "with a bit flipped": flipped,
    "of another number format": lambda whole: whole.replace(b'"F32"', b'"I32"', 1),
    "with a header longer than the file": lambda whole: (2**62).to_bytes(8, "little") + whole[8:],
    "of text": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


def damaged(path: str, *commands: str) -> list[Row]:
    return [Row(f"{Path(path).name} {how}", content(path, change), commands, (f"{path}: is damaged or is not",))
            for how, change in DAMAGED.items()]  # fmt: skip


def retyped(path: str, type_: torch.dtype, *commands: str) -> Row:
    damage = tensors(path, lambda named, _: named.update({first(named): named[first(named)].to(type_)}))
    return Row(f"{Path(path).name} of {type_}", damage, commands, (f"{path}: ", f"holds {type_}, not torch.float32"))


def described(*keys: str | int, value: Any) -> Row:
    phrases = (f"{PRIOR_JSON}: is not a kernel prior's description", "fit the prior again")
    return Row(f"prior.json with {value!r} at {'.'.join(map(str, keys))}", fields(PRIOR_JSON, *keys, value=value), ON_PRIORS,
               phrases)  # fmt: skip


PRIORS = [
    *damaged(PRIOR, *ON_PRIORS),
    *(retyped(PRIOR, type_, "svi", "score-prior") for type_ in (torch.float16, torch.float64, torch.int32)),
    Row("a prior of NaN", tensors(PRIOR, lambda named, _: named[first(named)].fill_(math.nan)), ON_PRIORS,
        (f"{PRIOR}: tensor", "holds NaN or infinity; the file is damaged")),
    Row("a prior without one tensor", tensors(PRIOR, lambda named, _: named.pop(first(named))), ON_PRIORS,
        (f"{PRIOR}: does not match prior.json", "fit the prior again")),
    Row("a prior without spread", tensors(PRIOR, lambda named, _: named["blocks.input.scale_tril"].zero_()), ON_PRIORS,
        (f"{PRIOR}: does not match prior.json", "the spread of block 'input' is not above 0", "fit the prior again")),
    Row("a prior without its description", removed(PRIOR_JSON), ON_PRIORS, ("runs/prior-ms: holds no kernel prior",)),
    Row("a prior without its tensors", removed(PRIOR), ON_PRIORS, (f"{PRIOR}: cannot be read",)),
    Row("an empty description", text(PRIOR_JSON, "{}"), ON_PRIORS,
        (f"{PRIOR_JSON}: has format None", "fit the prior again")),
    Row("a description that is a list", text(PRIOR_JSON, "[]"), ON_PRIORS, (f"{PRIOR_JSON}: should hold a JSON object",)),
    Row("a deeply nested description", text(PRIOR_JSON, "[" * 100_000), ON_PRIORS, (f"{PRIOR_JSON}: is not valid",)),
    Row("a prior of another version", fields(PRIOR_JSON, "format", value=99), ON_PRIORS,
        (f"{PRIOR_JSON}: has format 99, this version reads format 3; fit the prior again",)),
    described("family", value="cauchy"),
    described("family", value=None),
    described("family", value=["dwp"]),
    described("blocks", value=[]),
    described("blocks", value={}),
    described("blocks", "input", value=5),
    described("blocks", "input", "kernel_shape", value="3×3×3"),
    described("blocks", "input", "kernel_shape", value=[math.inf]),
    described("blocks", "input", "kernel_shape", value=[-3, 3, 3]),
    described("blocks", "input", "form", value=[1]),
    described("blocks", "input", "form", "latent_size", value="8"),
    described("blocks", "input", "form", "hidden", value=[0.5]),
    described("blocks", "input", "sites", value="input.weight"),
    described("blocks", "input", "sites", value=[1]),
    described("blocks", "input", "kernels", value="many"),
    described("blocks", "input", "kernels", value=None),
    described("blocks", "input", "nats_per_kernel", value=[1.0]),
    described("blocks", "input", "nats_per_kernel", value={"prior": "high"}),
    Row("a prior of other kernels", fields(PRIOR_JSON, "blocks", "input", "kernel_shape", value=[5, 5, 5]), ON_PRIORS,
        (f"{PRIOR}: does not match prior.json", "fit the prior again")),
    Row("a prior without one block", each(without_block,
            tensors(PRIOR, lambda named, _: [named.pop(name) for name in list(named) if name.startswith("blocks.input.")])),
        ("svi alone", "score-prior"), ("runs/prior-ms: ", "block")),
    *damaged(BANK, "fit-prior bank", "score-prior"),
    Row("kernels of NaN", tensors(BANK, lambda named, _: named[first(named)].fill_(math.nan)), ("fit-prior bank", "score-prior"),
        (f"{BANK}: tensor", "holds NaN or infinity")),
    Row("kernels of one more snapshot", tensors(BANK, lambda named, _: named.update({first(named): named[first(named)][1:]})),
        ("fit-prior bank", "score-prior"), (BANK, "not a multiple of kernels.json's sources")),
    Row("no kernels", tensors(BANK, lambda named, _: named.clear()), ("fit-prior bank", "score-prior"),
        (f"{BANK}: holds no kernels",)),
    Row("a bank's description of another version", fields(BANK_JSON, "format", value=9), ("fit-prior bank",),
        (f"{BANK_JSON}: is not the description of a kernel bank", "format 9, expected 1")),
    Row("a bank's description with text as number", fields(BANK_JSON, "sources", 0, "bootstrap", value="x"),
        ("fit-prior bank",), (f"{BANK_JSON}: is not the description of a kernel bank",)),
    Row("kernels of five axes", array(4, 1, 3, 3, 3, 3), ("fit-prior array",), ("k.npy: expected at least two kernels",)),
    Row("one kernel", array(1, 3, 3), ("fit-prior array",), ("k.npy: expected at least two kernels",)),
    Row("kernels of 0", array(9, 3, 3, change=np.zeros_like), ("fit-prior array",), ("k.npy: every weight is 0",)),
    Row("kernels with infinity", array(9, 3, 3, change=lambda k: np.full_like(k, np.inf)), ("fit-prior array",),
        ("k.npy: holds NaN or infinity; remove those kernels",)),
    Row("objects instead of kernels", lambda: np.save("k.npy", np.array([{}, {}]), allow_pickle=True), ("fit-prior array",),
        ("k.npy: cannot be read as a numpy array",)),
    Row("a truncated array", each(array(9, 3, 3), content("k.npy", lambda whole: whole[:-9])), ("fit-prior array",),
        ("k.npy: cannot be read as a numpy array",)),
    Row("kernels in another file format", text("k.pt", "x"), (("fit-prior", "--kernels", "k.pt", "--out", "new"),),
        ("k.pt: kernels are read from .safetensors and .npy files; convert it first",)),
]  # fmt: skip


def changed_metadata(name: str, *keys: str, value: Any) -> Row:
    def change(_: dict[str, Any], description: dict[str, Any]) -> None:
        place = description
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    phrases = (f"{POSTERIOR}: ", "train it again")
    return Row(f"a posterior of {name}", tensors(POSTERIOR, change), ON_POSTERIORS, phrases)


def scales(value: float) -> Damage:
    return tensors(POSTERIOR, lambda named, _: named[next(name for name in named if ".scale." in name)].fill_(value))


POSTERIORS = [
    *damaged(POSTERIOR, *ON_POSTERIORS),
    *damaged(SOURCE, "svi", "finetune source"),
    *(retyped(POSTERIOR, type_, *ON_POSTERIORS) for type_ in (torch.float16, torch.float64, torch.int32)),
    *(retyped(SOURCE, type_, "svi", "finetune source") for type_ in (torch.float16, torch.int64)),
    Row("a posterior of NaN", tensors(POSTERIOR, lambda named, _: named[first(named)].fill_(math.nan)), ON_POSTERIORS,
        (f"{POSTERIOR}: tensor", "holds NaN or infinity")),
    Row("a pickle", lambda: torch.save({"a": torch.ones(2)}, POSTERIOR), ON_POSTERIORS, (f"{POSTERIOR}: is damaged or",)),
    Row("a posterior without spread", scales(0.0), ON_POSTERIORS, (POSTERIOR, "not one positive number", "train it again")),
    Row("a posterior of negative spread", scales(-1.0), ON_POSTERIORS, (POSTERIOR, "not one positive number", "train it again")),
    Row("a posterior without one tensor", tensors(POSTERIOR, lambda named, _: named.pop(first(named))), ON_POSTERIORS,
        (f"{POSTERIOR}: does not hold a network of this version", "train it again")),
    Row("a posterior of other shapes", tensors(POSTERIOR, lambda named, _: named.update({first(named): named[first(named)][:1]})),
        ON_POSTERIORS, (f"{POSTERIOR}: does not hold a network of this version", "train it again")),
    Row("a prior instead of a posterior", copied(PRIOR, POSTERIOR), ON_POSTERIORS, (POSTERIOR, "train it again")),
    changed_metadata("another version", "format", value=99),
    changed_metadata("an older version", "format", value=4),
    changed_metadata("no version", "format", value=None),
    changed_metadata("another network", "network", "network", value="unet"),
    changed_metadata("an unknown network", "network", "network", value="transformer"),
    changed_metadata("other widths", "network", "widths", value=[2, 3, 4, 6]),
    changed_metadata("widths that are text", "network", "widths", value=["a", "b", "c", "d"]),
    changed_metadata("more blocks", "network", "network", value="paper-unet"),
    changed_metadata("an unknown field", "network", "depth", value=9),
    changed_metadata("more modalities", "network", "modalities", value=["flair", "t1"]),
    changed_metadata("more regions", "network", "regions", value=["whole", "core"]),
    changed_metadata("a region that is a path", "network", "regions", value=["../x"]),
    changed_metadata("an unknown layout", "network", "layout", value="x"),
    *(changed_metadata(f"a patch of {value}", "network", "patch", value=value)
      for value in ([4, 4, 4], [8, 8, 8], [16, 16], ["a", "b", "c"], [0, 0, 0], [1 << 40] * 3)),
    *(changed_metadata(f"a spacing of {value}", "network", "spacing", value=value) for value in ("x", 0, -3, 1e200, True)),
    changed_metadata("values that are text", "network", "values", value=[["x"]]),
    changed_metadata("a list instead of a network", "network", value=[1]),
    changed_metadata("text instead of members", "sites", value="x"),
    changed_metadata("no members", "sites", value=[]),
    changed_metadata("unknown sites", "sites", value=[["nowhere.weight"]]),
]  # fmt: skip

TABLE = [*SCANS, *SETTINGS, *CONFIGS, *RUNS, *PRIORS, *POSTERIORS]


# --- Tests ------------------------------------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, int]:
    """Return all files with their modification times, and all folders."""
    return {str(p.relative_to(root)): 0 if p.is_dir() else p.lstat().st_mtime_ns for p in root.rglob("*")}


def check(result, before: dict[str, int], root: Path, *phrases: str) -> None:
    assert result.exit_code == 2, result.output
    line = error_line(result.stderr)
    assert len(line) < 600
    for phrase in phrases:
        assert phrase in line
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert snapshot(root) == before


def test_the_table_is_long_enough():
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names) >= 60


def tiers() -> list[Any]:
    """Rows of the table: the fast tier takes the first of each part."""
    fast = {part[0].name for part in (SCANS, SETTINGS, CONFIGS, RUNS, PRIORS, POSTERIORS)}
    return [pytest.param(row, id=row.name, marks=() if row.name in fast else pytest.mark.slow) for row in TABLE]


@pytest.mark.parametrize("row", tiers())
def test_bad_input(command, copy_of_world, row):
    row.damage()
    for name in row.commands:
        before = snapshot(copy_of_world)
        result = command(*(COMMANDS[name] if isinstance(name, str) else name))
        if row.phrases is None:
            assert result.exit_code == 0, result.output
        else:
            check(result, before, copy_of_world, *row.phrases)


@pytest.mark.slow
def test_a_prior_for_another_kernel_shape(command, copy_of_world):
    np.save("k.npy", np.random.default_rng(0).normal(size=(50, 7, 7)))
    assert command("fit-prior", "--kernels", "k.npy", "--density-steps", 3).exit_code == 0
    before = snapshot(copy_of_world)
    result = command(
        "svi", "--n", 2, *TINY, "--members", 1, "--prior-dir", "runs/prior-k", "--center", "none", "--out", "runs/new"
    )
    check(result, before, copy_of_world, "holds 7×7 kernels, but 'input.weight' has 3×3×3")
    np.save("other.npy", np.random.default_rng(0).normal(size=(50, 5, 5)))
    before = snapshot(copy_of_world)
    result = command("score-prior", "runs/prior-k", "--kernels", "other.npy")
    check(result, before, copy_of_world, "other.npy: does not fit runs/prior-k")
    result = command("score-prior", "runs/prior-ms", "--kernels", "k.npy")
    check(result, before, copy_of_world, "k.npy: names no sites")


@pytest.mark.slow
def test_a_prediction_is_overwritten_only_on_request(command, copy_of_world):
    scan = FLAIR
    assert command("predict", SVI_RUN, scan, "--samples", 1).exit_code == 0
    before = snapshot(copy_of_world)
    check(command("predict", SVI_RUN, scan, "--samples", 1), before, copy_of_world, "already holds a prediction")
    both = command("predict", SVI_RUN, scan, "--samples", 1, "--resume", "--overwrite")
    check(both, before, copy_of_world, "resume and overwrite exclude each other")
    kept = command("predict", SVI_RUN, scan, "--samples", 1, "--resume")
    assert kept.exit_code == 0 and snapshot(copy_of_world) == before
    next(Path(SVI_RUN, "predictions").glob("*_mi.nii.gz")).unlink()
    repaired = command("predict", SVI_RUN, scan, "--samples", 1, "--resume")
    assert repaired.exit_code == 0 and snapshot(copy_of_world).keys() == before.keys()
    assert command("predict", SVI_RUN, scan, "--samples", 1, "--overwrite").exit_code == 0
    assert snapshot(copy_of_world) != before


@pytest.mark.slow
def test_one_bad_case_among_good_ones_leaves_no_prediction(command, copy_of_world):
    path = Path(CASE.format(9, "flair"))
    path.write_bytes(path.read_bytes()[:2000])
    before = snapshot(copy_of_world)
    check(command("predict", SVI_RUN, "data/brats", "--out", "new"), before, copy_of_world, str(path))
    assert not Path("new").exists()


@pytest.mark.slow
def test_scans_of_another_root_are_predicted_again(command, copy_of_world):
    """Maps of other scans with the same names must not be used."""
    assert command("evaluate", SVI_RUN, "--samples", 1).exit_code == 0
    marker = next(Path(SVI_RUN, "predictions").glob("*.json"))
    before = json.loads(marker.read_text())["settings"]
    Path("data/brats").rename("data/old")
    assert command("phantom", "brats", "data/brats", "--cases", 9, "--seed", 5).exit_code == 0
    result = command("evaluate", SVI_RUN, "--samples", 1)
    assert result.exit_code == 0, result.output
    assert "predictions: replacing 2 predictions, incomplete or of other scans" in result.stderr
    after = json.loads(marker.read_text())["settings"]
    assert after["posterior"] == before["posterior"] and after["scans"] != before["scans"]


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_cases(command, copy_of_world):
    run = Path("runs/finetune-brats-source-all-n2-seed0")
    (run / "run.json").write_text(json.dumps({"format": 1, "command": "finetune", "finished": False}))
    for path in Path("data/brats/HGG").glob("*_009_1"):
        path.rename(path.with_name(path.name.replace("Brats18", "gone")))
    result = command("finetune", "--n", 2, "--init", "source", *TINY, "--resume")
    assert result.exit_code == 2 and "split.json: cannot continue" in result.stderr
