"""`demo`: the whole algorithm on generated scans, in minutes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dwp_pyro.config import FinetuneConfig, FitPriorConfig, PredictConfig, RunOptions, SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.errors import RunError
from dwp_pyro.metrics import Summary
from dwp_pyro.pipeline.evaluate import evaluate
from dwp_pyro.pipeline.finetune import finetune
from dwp_pyro.pipeline.fit_prior import fit_prior
from dwp_pyro.pipeline.svi import svi
from dwp_pyro.pipeline.train_once import train_once
from dwp_pyro.progress import progress
from dwp_pyro.storage import read_json, write_json

__all__ = ["DemoResult", "demo"]

_MS_CASES = 12
_BRATS_CASES = 16
_WIDTHS = (8, 16, 32, 64)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and made.

    Args:
        table: arm → measure → summary over the test cases.
        prior: folder of the prior.
        runs: arm → folder of its run.
    """

    table: dict[str, dict[str, Summary]]
    prior: Path
    runs: dict[str, Path]


def demo(out: Path, device: str = "auto", seed: int = 0, say: Callable[[str], None] = lambda line: None) -> DemoResult:
    """Generated scans, source networks, kernels, prior, SVI on 5 scans, three arms beside it, prediction, evaluation.

    A step that a former call has finished is not made again.

    Args:
        out: folder for everything.
        device: to compute on.
        seed: of everything.
        say: called with a line before each step.

    Raises:
        UserError: if the folder holds something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "demo.json").exists():
            raise RunError(f"{out}: holds other files; choose another --out for the demo")
        if read_json(out / "demo.json") != {"seed": seed}:
            raise RunError(f"{out}: holds a demo of another --seed; give that one, or choose another --out")
    write_json(out / "demo.json", {"seed": seed})
    data = out / "data"
    say(f"1. Generated scans: {_MS_CASES} of multiple sclerosis, {_BRATS_CASES} of tumours, in {data}")
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
        common | {"root": str(data / "ms"), "bootstraps": 3, "snapshots": 2, "steps": 200, "vae_steps": 500}
    )
    say("2. Source networks on the MS scans; a prior over their kernels, block by block")
    train_once(partial(fit_prior, source), prior, device)
    target = common | {"root": str(data / "brats"), "n": 5, "steps": 200, "prior_from": str(prior)}
    arms: dict[str, tuple[str, Callable[[RunOptions], object]]] = {
        "DWP": ("svi-dwp", partial(svi, SviConfig.from_mapping(target | {"prior": "dwp", "steps": 600}))),
        "UNet-RI": ("finetune-random", partial(finetune, FinetuneConfig.from_mapping(target | {"init": "random"}))),
        "UNet-PR": ("finetune-source", partial(finetune, FinetuneConfig.from_mapping(target | {"init": "source"}))),
    }
    runs = {}
    table = {}
    for number, (arm, (name, train)) in enumerate(arms.items(), start=3):
        runs[arm] = out / "runs" / name
        say(f"{number}. {arm}: 5 tumour scans to learn from, then the test scans")
        train_once(train, runs[arm], device)
        (table[arm],) = evaluate(runs[arm], PredictConfig(samples=10, seed=seed), device=device).values()
    return DemoResult(table, prior, runs)
