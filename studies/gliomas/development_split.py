"""Split of the 36 development patients: a random half to train and validate on, the other half to compare methods on.

$ python studies/gliomas/development_split.py DATA/split.json data/gliomas-development.json

The decision of a run is chosen on its validation cases; methods are compared on others. The test patients of the
original split are in neither half.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    patients = sorted(json.loads(source.read_text())["train"])
    random.Random(0).shuffle(patients)
    half = len(patients) // 2
    out.write_text(json.dumps({"train": sorted(patients[:half]), "test": sorted(patients[half:])}, indent=2))


if __name__ == "__main__":
    main()
