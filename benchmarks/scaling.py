"""What a lab, 100 hospitals and 10,000 sites cost in a year, from the constants of docs/scaling.md.

$ python -m benchmarks.scaling
"""

from __future__ import annotations

from dataclasses import dataclass

# Measured on one core; docs/scaling.md has the commands.
SOURCE_NETWORK = 190.0  # core-seconds to train one
SVI = 440.0  # core-seconds of a run
PREDICT = 69.0  # core-seconds for a scan of 240×240×155, 21 samples
MAPS = 18.5  # MB of its mask and maps
PACK = 0.2  # MB of a prior with its moments
MERGE = 0.0045  # core-seconds of a pack
CHECK = 0.35  # core-seconds to read a scan before the first prediction is written

YEAR = 365 * 24 * 3600.0


@dataclass(frozen=True)
class Scale:
    """Who uses the program in a year.

    Args:
        name: Description.
        sites: Sites with annotated scans, each of which fits a prior of ten source networks and trains ten targets.
        scans: Scans to segment.
        cores: Cores of all sites.
    """

    name: str
    sites: int
    scans: int
    cores: int

    def row(self) -> str:
        training = self.sites * 10 * (SOURCE_NETWORK + SVI) / 3600
        predicting = self.scans * PREDICT / 3600
        busy = (training + predicting) * 3600 / (self.cores * YEAR)
        checking = self.scans * CHECK / 3600
        return (
            f"| {self.name} | {training:,.1f} | {predicting:,.1f} | {busy:.3%} of {self.cores:,} | "
            f"{checking:,.2f} h | {self.scans * MAPS / 1e6:,.3f} TB | {self.sites * PACK:,.1f} MB | "
            f"{self.sites * MERGE:,.1f} s |"
        )


SCALES = (
    Scale("a lab: 1 site, 200 scans", 1, 200, 8),
    Scale("100 hospitals, 20,000 scans", 100, 20_000, 800),
    Scale("10,000 sites, 10⁶ scans", 10_000, 1_000_000, 80_000),
)


def main() -> None:
    print(
        "| a year of | training, core-hours | predicting, core-hours | cores busy | checks | maps | packs | merging |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for scale in SCALES:
        print(scale.row())


if __name__ == "__main__":
    main()
