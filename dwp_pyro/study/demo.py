"""`demo`: the whole workflow on generated scans, in minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.evaluation.evaluate import evaluate
from dwp_pyro.metrics import Summary
from dwp_pyro.runtime.errors import FolderTaken
from dwp_pyro.runtime.files import read_json, write_json
from dwp_pyro.runtime.progress import progress
from dwp_pyro.study.runner import run_if_unfinished
from dwp_pyro.training.finetune import finetune
from dwp_pyro.training.fit_prior import fit_prior
from dwp_pyro.training.svi import svi

__all__ = ["DemoResult", "demo"]

_MS_CASES = 12
_BRATS_CASES = 16
_WIDTHS = (8, 16, 32, 64)


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Args:
        table: Method → metric → summary over the test cases.
        prior: Folder of the prior.
        runs: Method → folder of its run.
    """

    table: dict[str, dict[str, Summary]]
    prior: Path
    runs: dict[str, Path]


def demo(out: Path, device: str = "auto", seed: int = 0, say: Callable[[str], None] = lambda line: None) -> DemoResult:
    """Generate scans, train source networks, fit a prior, train three methods on 5 scans, and evaluate them.

    Steps that an earlier call has finished are skipped.

    Args:
        out: Output folder.
        device: Device to run on.
        seed: Seed of all random numbers.
        say: Function called with a line before each step.

    Raises:
        UserError: if the folder holds something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "demo.json").exists():
            raise FolderTaken(f"{out}: holds other files")
        if read_json(out / "demo.json") != {"seed": seed}:
            raise FolderTaken(f"{out}: holds a demo with another seed")
    write_json(out / "demo.json", {"seed": seed})
    data = out / "data"
    say(f"1. Generated scans: {_MS_CASES} of multiple sclerosis, {_BRATS_CASES} of tumors, in {data}")
    for dataset, cases in (("ms", _MS_CASES), ("brats", _BRATS_CASES)):
        if not (data / dataset).exists():
            unfinished = data / f"{dataset}-unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            with progress(f"{dataset} scans", cases) as advance:
                write_phantoms(dataset, unfinished, cases, seed, progress=partial(advance, ""))  # type: ignore[arg-type]
            unfinished.rename(data / dataset)

    common = {"widths": _WIDTHS, "validation": 2, "seed": seed}
    prior = out / "runs" / "prior-ms"
    source = FitPriorConfig.from_mapping(
        common | {"root": str(data / "ms"), "bootstraps": 3, "snapshots": 2, "steps": 200, "density_steps": 500}
    )
    say("2. Source networks on the MS scans, and a prior over their kernels per block")
    run_if_unfinished(partial(fit_prior, source), prior, device)
    target = common | {"root": str(data / "brats"), "n": 5, "steps": 200, "prior_dir": str(prior)}
    methods: dict[str, tuple[str, Callable[[RunOptions], object]]] = {
        "DWP": ("svi-dwp", partial(svi, SviConfig.from_mapping(target | {"prior": "dwp", "steps": 600}))),
        "UNet-RI": ("finetune-random", partial(finetune, FinetuneConfig.from_mapping(target | {"init": "random"}))),
        "UNet-PR": ("finetune-source", partial(finetune, FinetuneConfig.from_mapping(target | {"init": "source"}))),
    }
    runs = {}
    table = {}
    for number, (method, (name, train)) in enumerate(methods.items(), start=3):
        runs[method] = out / "runs" / name
        say(f"{number}. {method}: training on 5 tumor scans, evaluation on the test scans")
        run_if_unfinished(train, runs[method], device)
        (table[method],) = evaluate(runs[method], PredictConfig(samples=10, seed=seed), device=device).values()
    return DemoResult(table, prior, runs)
