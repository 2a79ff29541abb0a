"""Ablation of the default network, beside MONAI's networks, on validation cases of three data sets.

    python studies/network/ablation.py DATA OUT.jsonl [--sets lgg,hippocampus,ms] [--variants …] [--draws 0]

One plain training loop for all: AdamW, one cosine from the highest learning rate to a hundredth, softmax Dice +
cross-entropy (½ and ½), two augmented patches of 32³ per step. Each line of OUT.jsonl is one run; finished runs are
skipped, so an interrupted study resumes. Test cases are not read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet, DynUNet, MedNeXt, SegResNet
from torch import Tensor, nn

from dwp_pyro.data.case import Case, read_case
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.patches import PatchDataset
from dwp_pyro.data.preprocessing import Example, Preprocessing
from dwp_pyro.models.ops.instance_norm import InstanceNorm3d
from dwp_pyro.models.unet import ResidualUNet3d

STEPS, RATE, SIDE, BATCH, N, VALIDATION = 400, 4e-3, 32, 2, 5, 8
SPACING = {"lgg": 3.0, "hippocampus": 1.0, "ms": 2.0}
WIDTHS = (8, 16, 32, 64)


def _default(
    affine: bool = True,
    output_bias: bool = True,
    final_norm: bool = True,
    he: bool = False,
    small_output: bool = False,
    widths: tuple[int, ...] = WIDTHS,
) -> Callable[[int], nn.Module]:
    """Return a builder of the default network without one ingredient, or initialized as in the published form."""

    def build(classes: int) -> nn.Module:
        network = ResidualUNet3d(1, classes, widths)
        for name, module in list(network.named_modules()):
            if isinstance(module, InstanceNorm3d) and not affine:
                network.set_submodule(name, InstanceNorm3d(module.num_features))
            if isinstance(module, nn.Conv3d) and he and name != "output":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if not output_bias:
            network.output.bias = None
        if not final_norm:
            network.norm = nn.Identity()
        if small_output:
            nn.init.normal_(network.output.weight, std=0.01)
        return network

    return build


def _mednext(classes: int) -> nn.Module:
    return MedNeXt(init_filters=8, in_channels=1, out_channels=classes, blocks_down=(1, 1, 1), blocks_bottleneck=1,
                   blocks_up=(1, 1, 1), encoder_expansion_ratio=(2, 2, 2), decoder_expansion_ratio=(2, 2, 2),
                   bottleneck_expansion_ratio=2)  # fmt: skip


VARIANTS: dict[str, Callable[[int], nn.Module]] = {
    "default": _default(),
    "basicunet": lambda c: BasicUNet(3, 1, c, (8, 8, 16, 32, 64, 8)),
    "dynunet": lambda c: DynUNet(3, 1, c, (3,) * 4, (1, 2, 2, 2), (2, 2, 2), WIDTHS),
    "segresnet": lambda c: SegResNet(3, 8, 1, c),
    "no affine norms": _default(affine=False),
    "no output bias": _default(output_bias=False),
    "no final norm": _default(final_norm=False),
    "He": _default(he=True),
    "He and small output": _default(he=True, small_output=True),
    "published form": lambda c: ResidualUNet3d(1, c, WIDTHS, paper=True),
    "width 16": _default(widths=(16, 32, 64, 128)),
    "mednext": _mednext,
}


def _ms_cases(data: Path) -> tuple[list[Case], dict[str, str]]:
    listed = open_dataset(data / "real" / "ms" / "scans.csv", "manifest", {1: "lesion"}).cases
    cases = [*listed, *open_dataset(data / "openms").cases]
    return cases, {case.id: "mslessegP14" if "P14" in case.id else case.id for case in cases}


@cache
def examples(name: str, data: Path) -> tuple[dict[str, Example], dict[str, str]]:
    """Return id → example and id → patient of the cases that are not for testing."""
    if name == "ms":
        cases, patients = _ms_cases(data)
        labels, regions = {1: "lesion"}, [frozenset({1})]
    else:
        root = data / "real" / name
        found = open_dataset(root)
        ids = json.loads((root / "split.json").read_text())["train"]
        cases = [found.by_id[case] for case in ids]
        labels, regions = found.labels, [frozenset({value}) for value in sorted(found.labels)]
        patients = {case: case for case in ids}
    modality = next(iter(cases[0].images)) if name == "hippocampus" else "flair"
    preprocess = Preprocessing(SPACING[name])
    done = {case.id: preprocess(read_case(case, (modality,), labels), regions) for case in cases}
    return done, patients


def split(patients: dict[str, str], draw: int, validation: int) -> tuple[list[str], list[str]]:
    """Return the training cases of a draw, and the validation cases, which are the same for all draws."""
    groups = sorted(set(patients.values()))
    order = [groups[i] for i in np.random.default_rng(2026).permutation(len(groups))]
    held, rest = order[:validation], order[validation:]
    drawn = [rest[i] for i in np.random.default_rng(draw).permutation(len(rest))][:N]
    return [c for c in patients if patients[c] in drawn], [c for c in patients if patients[c] in held]


def one_hot(label: Tensor) -> Tensor:
    return torch.cat([1 - label.amax(1, keepdim=True), label], 1).float()


def train(network: nn.Module, cases: list[Example], seed: int) -> float:
    """Train in place; return the seconds."""
    patches = PatchDataset(cases, (SIDE,) * 3, seed, STEPS * BATCH)
    loss_of = DiceCELoss(include_background=False, softmax=True, lambda_dice=0.5, lambda_ce=0.5)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    start = time.perf_counter()
    network.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (0.505 + 0.495 * math.cos(math.pi * step / STEPS))
        image, label = (
            torch.stack(part) for part in list(zip(*(patches[step * BATCH + i] for i in range(BATCH)), strict=True))[:2]
        )
        loss = loss_of(network(image), one_hot(label))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(network: nn.Module, cases: list[Example]) -> tuple[list[list[float]], float, float]:
    """Return Dice [case][structure], mean NLL per brain voxel, and mean false positive voxels per case."""
    network.eval()
    scores, nll, false_voxels = [], [], []
    for case in cases:
        logits = sliding_window_inference(case.image.as_tensor()[None], (SIDE,) * 3, 4, network, 0.25, mode="gaussian")
        target = one_hot(case.label.as_tensor()[None])
        brain_mask = case.brain_mask.as_tensor()[None] > 0
        predicted = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1) * brain_mask
        both, total = (predicted * target).sum((0, 2, 3, 4)), (predicted + target).sum((0, 2, 3, 4))
        scores.append([float(2 * b / t) if t else 1.0 for b, t in zip(both[1:], total[1:], strict=True)])
        nll.append(float(-(logits.log_softmax(1) * target).sum(1, keepdim=True)[brain_mask].mean()))
        false_voxels.append(float((predicted[:, 1:].sum(1) * target[:, 0]).sum()))
    return scores, float(np.mean(nll)), float(np.mean(false_voxels))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", default="hippocampus,lgg,ms")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--draws", default="0")
    chosen = parser.parse_args()
    done = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    for draw in map(int, chosen.draws.split(",")):
        for variant in chosen.variants.split(","):
            for where in chosen.sets.split(","):
                key = {"set": where, "variant": variant, "draw": draw}
                if any(key.items() <= row.items() for row in done):
                    continue
                cases, patients = examples(where, chosen.data)
                trained, held = split(patients, draw, 5 if where == "ms" else VALIDATION)
                torch.manual_seed(draw)
                network = VARIANTS[variant](1 + len(next(iter(cases.values())).label))
                seconds = train(network, [cases[c] for c in trained], draw)
                scores, nll, false_voxels = evaluate(network, [cases[c] for c in held])
                row = key | {"dice": np.mean(scores, 0).round(4).tolist(), "nll": round(nll, 4),
                             "false_voxels": round(false_voxels), "seconds": round(seconds, 1),
                             "parameters": sum(p.numel() for p in network.parameters())}  # fmt: skip
                with chosen.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
