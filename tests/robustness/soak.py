"""A study of many small runs, once undisturbed and once killed again and again: python -m tests.robustness.soak

Its processes are watched: neither their memory nor their open files may grow. Both studies must end in the same bits.
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
from tests.commands.conftest import TINY
from tests.robustness.test_kill import results
from tests.robustness.trial import Ended, run

_EVERY = 1.0  # seconds between two looks at the processes
_SETTINGS = {
    "members": 1,
    "root": "data/brats",
    "widths": [2, 3, 4, 5],
    "patch": 24,
    "validation": 1,
    "steps": 10,
}
_ARMS = {
    "DWP": {"command": "svi", "prior": "dwp"},
    "N(0, 1)": {"command": "svi", "prior": "normal", "center": "none"},
    "UNet-PR": {"command": "finetune", "init": "source"},
}
_SHARE = 0.4  # of the time, for the undisturbed study: beginning again costs the other half as much again
_LONGEST = 25.0  # seconds until a kill
_MB_A_CELL = 0.01  # that the study's own process holds: its rows, and their share of a bootstrap


@dataclass
class Watched:
    """What /proc says of the processes of a group: process id → pairs of resident MB and open files, over time."""

    seen: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    def look(self, group: int) -> None:
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                # After the name, in brackets: state, parent, group.
                if int((process / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                    continue
                files = sum(1 for _ in (process / "fd").iterdir())
                status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                self.seen[int(process.name)].append((int(status["VmRSS"].split()[0]) / 1024, files))
            except (OSError, KeyError):  # it has ended meanwhile
                continue

    def growth(self) -> dict[int, tuple[float, float, int, int]]:
        """Of each that lived long: median MB in the second and in the last fifth of its life, then most files."""
        found = {}
        for process, looks in self.seen.items():
            fifth = len(looks) // 5
            if fifth < 5:
                continue
            early, late = looks[fifth : 2 * fifth], looks[-fifth:]
            megabytes = [statistics.median(memory for memory, _ in part) for part in (early, late)]
            files = [max(count for _, count in part) for part in (early, late)]
            found[process] = (megabytes[0], megabytes[1], files[0], files[1])
        return found


def _must(ended: Ended) -> None:
    if ended.code:
        raise click.ClickException(ended.said)


def _study(world: Path, seeds: int) -> Path:
    path = world / f"{seeds}.yaml"
    runs = [{"methods": list(_ARMS), "n": [2], "seeds": list(range(seeds))}]
    study = {"settings": _SETTINGS, "methods": _ARMS, "runs": runs, "samples": 2}
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@click.command()
@click.option("--minutes", type=float, default=30.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the moments of the kills.")
def main(minutes: float, seed: int) -> None:
    """Both studies in about so many minutes; exit code 1 if anything grows or differs."""
    begun = time.monotonic()
    moments = random.Random(seed)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        for kind, cases in (("ms", 4), ("brats", 6)):
            write_phantoms(kind, world / "data" / kind, cases, shape=(28, 32, 28))
        (world / "runs").mkdir()
        prior = ("fit-prior", *TINY, "--bootstraps", 1, "--density-steps", 10)
        _must(run([*prior, "--out", world / "runs/prior-ms"], world, world / "runs/prior-ms"))
        trial = run(["experiment", _study(world, 4), "--out", world / "small"], world, world / "small")
        _must(trial)
        seeds = max(4, round(60 * minutes * _SHARE / trial.seconds * 4))
        study = _study(world, seeds)
        print(f"{seeds * len(_ARMS)} runs, {trial.seconds / 4 / len(_ARMS):.1f} s each", flush=True)

        quiet = Watched()
        out = world / "undisturbed"
        ended = run(["experiment", study, "--out", out], world, out, watch=quiet.look, watch_every=_EVERY)
        _must(ended)
        print(f"undisturbed: {ended.seconds:.0f} s")
        for process, (early, late, files, files_late) in quiet.growth().items():
            what = "study" if process == ended.pid else "worker"
            print(f"{what}: {early:.0f} → {late:.0f} MB, {files} → {files_late} open files", flush=True)
            allowed = 1.02 * early + 5 + (_MB_A_CELL * seeds * len(_ARMS) if what == "study" else 0)
            if late > allowed or files_late > files:
                failures.append(f"the {what} grows")

        expected, out = results(out), world / "disturbed"
        kills, start, harsh = 0, time.monotonic(), Watched()
        while True:
            after = moments.uniform(0, _LONGEST)
            ended = run(
                ["experiment", study, "--out", out], world, out, after=after, watch=harsh.look, watch_every=_EVERY
            )
            if ended.code == 0:
                break
            kills += 1
            if ended.code > 0:
                failures.append(ended.said)
                break
        most = {process: (max(m for m, _ in looks), max(f for _, f in looks)) for process, looks in harsh.seen.items()}
        print(
            f"disturbed: {kills} kills in {time.monotonic() - start:.0f} s; {len(most)} processes, none above ", end=""
        )
        print(f"{max(m for m, _ in most.values()):.0f} MB and {max(f for _, f in most.values())} open files")
        if results(out) != expected:
            failures.append("the results differ")
        else:
            size = sum(len(content) for content in expected.values() if isinstance(content, bytes))
            print(f"same: {len(expected)} files, {size / 1e6:.1f} MB")
    for failure in failures:
        print(f"failed: {failure}")
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
