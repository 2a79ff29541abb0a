"""`demo`: the whole workflow on generated scans, in minutes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dwp_pyro.config.base import RunOptions
from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig
from dwp_pyro.data.phantom import write_phantoms
from dwp_pyro.evaluation.evaluate import evaluate
from dwp_pyro.metrics import Summary
from dwp_pyro.runtime.errors import FolderTaken
from dwp_pyro.runtime.files import new_folder, read_json, write_json
from dwp_pyro.study.runner import run_if_unfinished
from dwp_pyro.training.finetune import finetune
from dwp_pyro.training.fit_prior import fit_prior
from dwp_pyro.training.svi import svi

__all__ = ["demo"]

_logger = logging.getLogger(__name__)

_MS_CASES = 12
_BRATS_CASES = 16
_WIDTHS = (8, 16, 32, 64)


def demo(out: Path, device: str = "auto", seed: int = 0) -> tuple[dict[str, dict[str, Summary]], dict[str, Path]]:
    """Generate scans, train source networks, fit a prior, train three methods on 5 scans, and evaluate them.

    Steps that an earlier call has finished are skipped.

    Returns:
        Method → metric → summary over the test cases; method → folder of its run.

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
    _logger.info(f"1. Generated scans: {_MS_CASES} of multiple sclerosis, {_BRATS_CASES} of tumors, in {data}")
    for dataset, cases in (("ms", _MS_CASES), ("brats", _BRATS_CASES)):
        if not (data / dataset).exists():
            with new_folder(data / dataset) as folder:
                write_phantoms(dataset, folder, cases, seed)  # type: ignore[arg-type]

    common = {"widths": _WIDTHS, "validation": 2, "seed": seed}
    prior = out / "runs" / "prior-ms"
    source = FitPriorConfig.from_mapping(
        common | {"root": str(data / "ms"), "bootstraps": 3, "snapshots": 2, "steps": 200, "density_steps": 500}
    )
    _logger.info("2. Source networks on the MS scans, and a prior over their kernels per block")
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
        _logger.info(f"{number}. {method}: training on 5 tumor scans, evaluation on the test scans")
        run_if_unfinished(train, runs[method], device)
        (table[method],) = evaluate(runs[method], PredictConfig(samples=10, seed=seed), device=device).values()
    return table, runs
