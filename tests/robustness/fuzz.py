"""Read mutated files with the package's own readers: `python -m tests.robustness.fuzz --mutants 20000`.

The package itself writes small files of each kind that it reads. Mutations change bits and bytes, remove, repeat or
splice parts, insert extreme numbers, replace values in JSON and YAML, and change tensors under a valid checksum. A
reader of a mutant must return or raise a `UserError` that names the file. Anything else is a finding: another
exception, a crash, more than 5 seconds, more than 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
import yaml
from click.testing import CliRunner

from dwp_pyro.cli import main
from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig
from dwp_pyro.data.case import read_volume
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.data.split import read_split
from dwp_pyro.evaluation.evaluate import find_test_cases
from dwp_pyro.inference.checkpoint import load_checkpoint, save_checkpoint, steps_reported
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.prediction.predict import load_run, not_predicted
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.blocks import kernel_sites, read_blocks
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.runtime.errors import UserError
from dwp_pyro.runtime.files import read_yaml, write_json, write_yaml
from dwp_pyro.runtime.non_finite_guard import NonFiniteGuard
from dwp_pyro.runtime.run_folder import RunFolder
from dwp_pyro.study.grid import Study
from dwp_pyro.study.runner import read_rows, run_if_unfinished
from tests.robustness.mutate import mutate

__all__ = ["TARGETS", "Finding", "fuzz", "make_files"]

_MAX_SECONDS = 5  # per read
_MAX_MEMORY = 2 * 2**30  # bytes per read
_TRAINING = ("--widths", "1,2,2,2", "--patch", "16", "--validation", "1", "--steps", "2")

# ---------------------------------------------------------------------------------------------------------------------
# Files


class Target(NamedTuple):
    """File to mutate.

    Args:
        path: Path, relative to the folder of `make_files`.
        read: Reader of the file; takes the folder of `make_files`.
        weight: Relative frequency of mutants of the file.
        alternatives: Texts that an error message may contain instead of the file name.
    """

    path: str
    read: Callable[[Path], Any]
    weight: float = 1.0
    alternatives: tuple[str, ...] = ()


def make_files(root: Path) -> None:
    """Write the files of `TARGETS`."""
    for dataset in ("ms", "brats"):
        write_phantoms(dataset, root / dataset, 5, shape=(20, 24, 20), spacing=7.0)
    study = {
        "settings": {"root": str(root / "brats"), "validation": 1, "steps": 2, "prior_dir": str(root / "prior")},
        "methods": {"RI": {"command": "finetune", "init": "random"}, "DWP": {"command": "svi", "center": "none"}},
        "runs": [{"methods": ["RI", "DWP"], "n": [1], "seeds": [0, 1]}],
        "evaluate": "validation",
        "samples": 1,
        "reference": "RI",
    }
    write_yaml(root / "study.yaml", study)
    source = ("--root", "@ms", "--bootstraps", "2", "--density-steps", "2", "--out", "@prior")
    target = ("--root", "@brats", "--n", "1", "--members", "2", "--prior-dir", "@prior", "--out", "@run")
    _command("fit-prior", *source, *_TRAINING)(root)
    _command("svi", *target, *_TRAINING)(root)
    _command("evaluate", "@run", "--samples", "1")(root)
    # --resume needs an unfinished run.
    write_json(root / "run/run.json", {"format": 1, "command": "svi", "finished": False})
    write_yaml(root / "settings.yaml", read_yaml(root / "run/config.yaml"))
    (root / "msd/imagesTr").mkdir(parents=True)
    (root / "nnunet/imagesTr").mkdir(parents=True)
    scan = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([-2.0, 2.0, 3.0, 1.0]))
    for path in ("scan.nii", "scan.nii.gz", "msd/imagesTr/a.nii.gz", "nnunet/imagesTr/a_0000.nii.gz"):
        nibabel.save(scan, root / path)
    write_json(root / "msd/dataset.json", {"modality": {"0": "FLAIR"}, "labels": {"0": "background", "1": "lesion"}})
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    files = {"a": {"images": ["imagesTr/a_0000.nii.gz"], "label": "imagesTr/a_0000.nii.gz"}}
    dataset_info = {"channel_names": {"0": "FLAIR"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 1}
    write_json(root / "nnunet/dataset.json", dataset_info | {"dataset": files})
    (root / "scans.csv").write_text("id,flair,t1,label\na,scan.nii,scan.nii.gz,scan.nii\nb,scan.nii,,\n")
    anat = root / "bids/derivatives/x/sub-1/anat"
    for folder in (root / "bids/sub-1/anat", anat):
        folder.mkdir(parents=True)
    nibabel.save(scan, root / "bids/sub-1/anat/sub-1_FLAIR.nii.gz")
    nibabel.save(scan, anat / "sub-1_dseg.nii.gz")
    write_json(anat / "sub-1_dseg.json", {"Type": "Tissue"})
    (anat / "sub-1_dseg.tsv").write_text("index\tname\n0\tbackground\n1\tlesion\n2\toedema\n")
    write_json(root / "split.json", {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e"]})
    for config in (SviConfig, FinetuneConfig, FitPriorConfig, PredictConfig):
        write_yaml(root / f"{config.__name__}.yaml", config().to_mapping())
    np.save(root / "kernels.npy", np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32))
    parameters, optimizer = _training(root)
    save_checkpoint(root / "checkpoint.safetensors", 7, parameters, optimizer)
    rows = "method,n,seed,case,dice,hd95,nll,ece,iou,seconds,settings\nRI,1,0,a,0.5,3.0,0.1,0.2,0.4,1.5,abc\n"
    (root / "results.csv").write_text(rows)


def _training(root: Path) -> tuple[dict[str, torch.nn.Parameter], NonFiniteGuard]:
    """Return the parameters of a network after one optimizer step, and the optimizer."""
    network = Posterior.load(root / "run/posterior.safetensors").members[0].network.requires_grad_(True)
    parameters = {f"network.{name}": parameter for name, parameter in network.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    sum(parameter.square().sum() for parameter in parameters.values()).backward()
    optimizer.step()
    return parameters, NonFiniteGuard(optimizer)


def _read_posterior(root: Path) -> None:
    posterior = Posterior.load(root / "run/posterior.safetensors")
    for member in range(len(posterior.members)):
        assert all(tensor.isfinite().all() for tensor in posterior.means(member).values())
        posterior.draw(0, member)


def _read_prior(root: Path) -> None:
    prior = KernelPrior.load(root / "prior")
    model_card(prior)
    for name in prior.block_infos:
        prior.block(name).rsample((2,))
    sites = list(kernel_sites(Posterior.load(root / "prior/source.safetensors").members[0].network))
    assigned = prior.assign_sites({site: "input" for site in sites})
    for site in sites:
        assigned.block_name(site)


def _read_bank(root: Path) -> None:
    bank = read_kernels(root / "prior/kernels.safetensors")
    for site in bank.kernels:
        bank.identities(site)


def _read_checkpoint(root: Path) -> None:
    steps_reported(root / "checkpoint.safetensors")
    load_checkpoint(root / "checkpoint.safetensors", *_training(root))


def _read_config(kind: type[SviConfig | FinetuneConfig | FitPriorConfig | PredictConfig]) -> Callable[[Path], Any]:
    def read(root: Path) -> None:
        config = kind.from_yaml(root / f"{kind.__name__}.yaml")
        assert kind.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping()))) == config

    return read


def _read_run(root: Path) -> None:
    find_test_cases(root / "run", None)
    _resume(root)


def _resume(root: Path) -> None:
    def check(options: RunOptions) -> None:
        settings = read_yaml(root / "settings.yaml")
        RunFolder.check(options.out, "svi", settings, resume=options.resume, overwrite=False)

    run_if_unfinished(check, root / "run", "cpu")


def _read_predictions(root: Path) -> None:
    data = find_test_cases(root / "run", None)
    not_predicted(root / "run/predictions", data.cases, load_run(root / "run"), PredictConfig(samples=1))


def _command(*arguments: str) -> Callable[[Path], Any]:
    """Return a function that calls a command in a folder, written "@", and raises its error as `UserError`."""

    def read(root: Path) -> None:
        resolved = [str(root / part[1:]) if part.startswith("@") else part for part in arguments]
        result = CliRunner().invoke(main, resolved, catch_exceptions=False)
        if result.exit_code == 2:
            raise UserError(result.stderr.splitlines()[-1])
        assert result.exit_code == 0, result.output

    return read


def _open_dataset(path: str, layout: str | None = None) -> Callable[[Path], Any]:
    return lambda root: open_dataset(root / path, layout, needs_labels=False)


_read_report = _command("report", "@run", "--out", "@page.html")

TARGETS = (
    Target("scan.nii", lambda root: read_volume(root / "scan.nii"), 12),
    Target("scan.nii.gz", lambda root: read_volume(root / "scan.nii.gz"), 8),
    Target("run/posterior.safetensors", _read_posterior, 1.5),
    Target("prior/prior.safetensors", _read_prior, 1.5),
    Target("prior/prior.json", _read_prior, 1.5, alternatives=("prior/prior.",)),
    Target("prior/kernels.safetensors", _read_bank, 3),
    Target("prior/kernels.json", _read_bank, 3, alternatives=("prior/kernels.",)),
    Target("kernels.npy", lambda root: read_kernels(root / "kernels.npy"), 4),
    Target("checkpoint.safetensors", _read_checkpoint, 1.5),
    Target("msd/dataset.json", _open_dataset("msd"), 2, alternatives=("msd",)),
    Target("nnunet/dataset.json", _open_dataset("nnunet", "nnunet"), 3, alternatives=("nnunet",)),
    Target("scans.csv", _open_dataset("scans.csv"), 3),
    Target("bids/derivatives/x/sub-1/anat/sub-1_dseg.tsv", _open_dataset("bids", "bids"), 2, alternatives=("bids",)),
    Target("bids/derivatives/x/sub-1/anat/sub-1_dseg.json", _open_dataset("bids", "bids"), 1, alternatives=("bids",)),
    Target("split.json", lambda root: read_split(root / "split.json", {name: name for name in "abcde"}, 1, 1, 0), 3),
    Target("SviConfig.yaml", _read_config(SviConfig), 1),
    Target("FinetuneConfig.yaml", _read_config(FinetuneConfig), 1),
    Target("FitPriorConfig.yaml", _read_config(FitPriorConfig), 1),
    Target("PredictConfig.yaml", _read_config(PredictConfig), 3),
    Target("study.yaml", lambda root: Study.read(root / "study.yaml"), 2),
    Target("run/blocks.yaml", lambda root: read_blocks(root / "run/blocks.yaml", ["input.weight"]), 2),
    Target("run/config.yaml", _read_run, 1, alternatives=("/run", "--root", "holds no case")),
    Target("run/run.json", _resume, 2, alternatives=("/run",)),
    Target("run/split.json", _read_run, 1),
    Target("results.csv", lambda root: read_rows(root / "results.csv"), 3),
    Target("run/predictions/{case}.json", _read_predictions, 0.5, alternatives=("run/predictions",)),
    Target("run/evaluation.json", _read_report, 0.3),
    Target("run/metrics.jsonl", _read_report, 0.2),
)

# ---------------------------------------------------------------------------------------------------------------------
# Mutants


class Finding(NamedTuple):
    """Wrong behavior of a reader.

    Args:
        mutant: Number of the mutant.
        path: Path of the mutated file.
        problem: Description of the behavior.
        content: Content of the mutant.
    """

    mutant: int
    path: str
    problem: str
    content: bytes


class FuzzResult(NamedTuple):
    """Result of reading all mutants.

    Args:
        counts: Path → number of mutants by outcome, which is "read", "refused" or "finding".
        findings: Wrong behavior of readers.
        slowest: Seconds of the slowest read, and the path.
        seconds: Total duration.
    """

    counts: dict[str, Counter[str]]
    findings: list[Finding]
    slowest: tuple[float, str]
    seconds: float


def fuzz(root: Path, mutants: Sequence[int], targets: Sequence[Target] = TARGETS) -> FuzzResult:
    """Read mutants in child processes.

    Args:
        root: Folder of `make_files`; its files are restored at the end.
        mutants: Numbers of the mutants, which determine their content.
        targets: Files to mutate.
    """
    start = time.monotonic()
    (case,) = (root / "run/predictions").glob("*.json")
    targets = [target._replace(path=target.path.format(case=case.stem)) for target in targets]
    originals = {target.path: (root / target.path).read_bytes() for target in targets}
    others = list(originals.values())
    assigned = {target.path: list[int]() for target in targets}
    for mutant in mutants:
        rng = random.Random(mutant)
        assigned[rng.choices(targets, [target.weight for target in targets])[0].path].append(mutant)
    counts = {target.path: Counter[str]() for target in targets}
    findings: list[Finding] = []
    slowest = (0.0, "")
    for target in targets:
        path, remaining = target.path, assigned[target.path]
        while remaining:
            done = 0
            for record in _read_in_child(root, target, remaining, others):
                mutant = remaining[done]
                done += 1
                counts[path][record["outcome"]] += 1
                slowest = max(slowest, (record["seconds"], path))
                if record["outcome"] == "finding":
                    content = mutate(Path(path), originals[path], others, _rng(mutant))
                    findings.append(Finding(mutant, path, record["problem"], content))
            if done < len(remaining):
                findings.append(Finding(remaining[done], path, "the process died", (root / path).read_bytes()))
            (root / path).write_bytes(originals[path])
            remaining = remaining[done + 1 :]
    return FuzzResult(counts, findings, slowest, time.monotonic() - start)


def _rng(mutant: int) -> random.Random:
    return random.Random(f"mutant {mutant}")


def _read_in_child(root: Path, target: Target, mutants: Sequence[int], others: list[bytes]) -> Iterator[dict[str, Any]]:
    """Yield a record for each mutant that a child process reads before it ends."""
    original = (root / target.path).read_bytes()
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read_end)
            with os.fdopen(write_end, "w", buffering=1) as pipe:
                _limit_memory()
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
                for mutant in mutants:
                    (root / target.path).write_bytes(mutate(Path(target.path), original, others, _rng(mutant)))
                    signal.alarm(_MAX_SECONDS + 1)  # SIGALRM kills the process
                    pipe.write(json.dumps(_read(root, target)) + "\n")
                    signal.alarm(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        yield from map(json.loads, pipe)
    os.waitpid(child, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _read(root: Path, target: Target) -> dict[str, Any]:
    start = time.monotonic()
    outcome, problem = "read", ""
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            target.read(root)
    except UserError as error:
        outcome = "refused"
        if not any(name in str(error) for name in (Path(target.path).name, *target.alternatives)):
            outcome, problem = "finding", f"the message does not name the file: {error}"[:500]
    except Exception:
        outcome, problem = "finding", traceback.format_exc()[-1500:]
    return {"outcome": outcome, "problem": problem, "seconds": time.monotonic() - start}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=20_000, help="number of mutants")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", default="", help="part of the paths of the files to mutate")
    parser.add_argument("--keep", type=Path, help="folder for the mutants with findings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = [target for target in TARGETS if options.only in target.path]
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        result = fuzz(Path(folder), range(options.first, options.first + options.mutants), targets)
    for path, counts in result.counts.items():
        print(f"{path}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
    for finding in result.findings:
        print(f"\nmutant {finding.mutant} of {finding.path}: {finding.problem}")
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{finding.mutant}-{Path(finding.path).name}").write_bytes(finding.content)
    seconds, path = result.slowest
    print(
        f"\n{sum(sum(counts.values()) for counts in result.counts.values())} mutants, {len(result.findings)} "
        f"findings, {result.seconds:.0f} s; the slowest read took {seconds:.2f} s ({path})"
    )
    sys.exit(bool(result.findings))


if __name__ == "__main__":
    _main()
