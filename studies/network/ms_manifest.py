"""Write a manifest of the MS scans: `python studies/network/ms_manifest.py DATA ms.csv`.

It lists DATA/real/ms and DATA/openms: 14 scans of 12 patients, three of which are visits of one patient.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def main(data: Path, out: Path) -> None:
    rows = []
    with open(data / "real" / "ms" / "scans.csv", newline="") as file:
        for row in csv.DictReader(file):
            patient = "mslessegP14" if row["id"].startswith("mslessegP14") else row["id"]
            rows.append((row["id"], patient, data / "real" / "ms" / row["flair"], data / "real" / "ms" / row["label"]))
    for folder in sorted((data / "openms").glob("patient*")):
        files = (folder / f"{folder.name}_{end}.nii.gz" for end in ("FLAIR", "consensus_gt"))
        rows.append((folder.name, folder.name, *files))
    with open(out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "flair", "label"))
        writer.writerows((name, patient, *(path.resolve() for path in files)) for name, patient, *files in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
