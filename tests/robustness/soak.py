"""Run a study of many small runs twice, undisturbed and with repeated kills: python -m tests.robustness.soak

Memory and open files of its processes must not grow. Both studies must give bit-identical results.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import click
import yaml

from dwp_pyro.data.phantom import write_phantoms
from tests.robustness.test_kill import results
from tests.robustness.trial import TrialResult, run
from tests.world import TINY

_WATCH_INTERVAL = 1.0  # seconds between two measurements
_SETTINGS = {"members": 1, "root": "data/brats", "widths": [2, 3, 4, 5], "patch": 24, "validation": 1, "steps": 10}
_METHODS = {
    "DWP": {"command": "svi", "prior": "dwp"},
    "N(0, 1)": {"command": "svi", "prior": "normal", "center": "none"},
    "UNet-PR": {"command": "finetune", "init": "source"},
}
_UNDISTURBED_FRACTION = 0.4  # of the time; kills make the other study half as long again
_MAX_KILL_SECONDS = 25.0  # longest time until a kill
_MB_PER_RUN = 0.01  # rows and bootstrap samples that the study's own process keeps


@dataclass
class ProcessMonitor:
    """Memory and open files of the processes of a group.

    Args:
        samples: Process id → pairs of resident memory in MB and open files, over time.
    """

    samples: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, group: int) -> None:
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                # The name in brackets is followed by state, parent and group.
                if int((process / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                    continue
                files = sum(1 for _ in (process / "fd").iterdir())
                status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                self.samples[int(process.name)].append((int(status["VmRSS"].split()[0]) / 1024, files))
            except (OSError, KeyError):  # the process has ended
                continue

    def growth(self) -> dict[int, tuple[float, float, int, int]]:
        """Return median MB and maximum of files in the second and last fifth of each long-lived process."""
        found = {}
        for process, samples in self.samples.items():
            fifth = len(samples) // 5
            if fifth < 5:
                continue
            early, late = samples[fifth : 2 * fifth], samples[-fifth:]
            megabytes = [statistics.median(memory for memory, _ in part) for part in (early, late)]
            files = [max(count for _, count in part) for part in (early, late)]
            found[process] = (megabytes[0], megabytes[1], files[0], files[1])
        return found


def _require_success(trial: TrialResult) -> None:
    if trial.exit_code:
        raise click.ClickException(trial.output)


def _study(world: Path, seeds: int) -> Path:
    path = world / f"{seeds}.yaml"
    runs = [{"methods": list(_METHODS), "n": [2], "seeds": list(range(seeds))}]
    study = {"settings": _SETTINGS, "methods": _METHODS, "runs": runs, "samples": 2}
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@click.command()
@click.option("--minutes", type=float, default=30.0, show_default=True, help="Approximate duration.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the kill times.")
def main(minutes: float, seed: int) -> None:
    """Run both studies; exit with code 1 if memory or open files grow, or if results differ."""
    start = time.monotonic()
    kill_times = random.Random(seed)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        for kind, cases in (("ms", 4), ("brats", 6)):
            write_phantoms(kind, world / "data" / kind, cases, shape=(28, 32, 28))
        (world / "runs").mkdir()
        prior = ("fit-prior", *TINY, "--bootstraps", 1, "--density-steps", 10)
        _require_success(run([*prior, "--out", world / "runs/prior-ms"], world, world / "runs/prior-ms"))
        trial = run(["experiment", _study(world, 4), "--out", world / "small"], world, world / "small")
        _require_success(trial)
        seeds = max(4, round(60 * minutes * _UNDISTURBED_FRACTION / trial.seconds * 4))
        study = _study(world, seeds)
        print(f"{seeds * len(_METHODS)} runs, {trial.seconds / 4 / len(_METHODS):.1f} s each", flush=True)

        monitor = ProcessMonitor()
        out = world / "undisturbed"
        arguments = ["experiment", study, "--out", out]
        trial = run(arguments, world, out, watch=monitor.measure, watch_every=_WATCH_INTERVAL)
        _require_success(trial)
        print(f"undisturbed: {trial.seconds:.0f} s")
        for process, (early, late, files, files_late) in monitor.growth().items():
            name = "study" if process == trial.pid else "worker"
            print(f"{name}: {early:.0f} → {late:.0f} MB, {files} → {files_late} open files", flush=True)
            allowed = 1.02 * early + 5 + (_MB_PER_RUN * seeds * len(_METHODS) if name == "study" else 0)
            if late > allowed or files_late > files:
                failures.append(f"the {name} grows")

        expected, out = results(out), world / "disturbed"
        arguments = ["experiment", study, "--out", out]
        kills, disturbed_start, monitor = 0, time.monotonic(), ProcessMonitor()
        while True:
            after = kill_times.uniform(0, _MAX_KILL_SECONDS)
            trial = run(arguments, world, out, after=after, watch=monitor.measure, watch_every=_WATCH_INTERVAL)
            if trial.exit_code == 0:
                break
            kills += 1
            if trial.exit_code > 0:
                failures.append(trial.output)
                break
        seconds = time.monotonic() - disturbed_start
        memory = max(memory for samples in monitor.samples.values() for memory, _ in samples)
        files = max(files for samples in monitor.samples.values() for _, files in samples)
        print(f"disturbed: {kills} kills in {seconds:.0f} s; {len(monitor.samples)} processes, ", end="")
        print(f"at most {memory:.0f} MB and {files} open files")
        if results(out) != expected:
            failures.append("the results differ")
        else:
            size = sum(len(content) for content in expected.values() if isinstance(content, bytes))
            print(f"identical: {len(expected)} files, {size / 1e6:.1f} MB")
    for failure in failures:
        print(f"failed: {failure}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
