"""What a lab, 100 hospitals and 10,000 sites cost in a year, from the constants of docs/scaling.md.

$ python -m benchmarks.scaling
"""

from __future__ import annotations

from dataclasses import dataclass

# Measured on one core of the machine of docs/performance.md, with the default network and settings.
SOURCE_NETWORK = 240.0  # core-seconds to train one
SVI = 440.0  # core-seconds of a run
PREDICT = 77.0  # core-seconds for a scan of 240×240×155, 21 samples
MAPS = 18.5  # MB of its mask and maps
PACK = 0.4  # MB of a Gaussian prior with its moments
MERGE = 0.0044  # core-seconds of a pack
RUN = 0.023  # seconds of a study's run beside its work
ROW = 250  # bytes of a line of results.csv

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
        merging, wire = self.sites * MERGE, self.sites * PACK / 1000
        return (
            f"| {self.name} | {training:,.0f} | {predicting:,.0f} | {busy:.2%} of {self.cores:,} cores | "
            f"{self.scans * MAPS / 1e6:,.2f} TB | {wire:.3g} GB | {merging:.3g} s |"
        )


SCALES = (
    Scale("a lab: 1 site, 200 scans", 1, 200, 8),
    Scale("100 hospitals, 20,000 scans", 100, 20_000, 800),
    Scale("10,000 sites, 10⁶ scans", 10_000, 1_000_000, 80_000),
)


def main() -> None:
    print("| who | training, core-hours | predicting, core-hours | load | maps | packs sent | merging |")
    print("|---|---|---|---|---|---|---|")
    for scale in SCALES:
        print(scale.row())


if __name__ == "__main__":
    main()
