"""The messages of the app: files of packs, in safetensors and JSON; no images, no case ids, no pickles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from dwp_pyro import SviConfig

#: Files of the common start: the prior and the source network that it is centered on.
START = ("prior.json", "prior.safetensors", "source.safetensors")
#: File of a site's answer.
POSTERIOR = ("posterior.safetensors",)


def pack(folder: Path, names: Sequence[str]) -> RecordDict:
    """Return the content of a message with files of a folder."""
    return RecordDict({"pack": ConfigRecord({name: (folder / name).read_bytes() for name in names})})


def unpack(content: RecordDict, folder: Path, names: Sequence[str]) -> None:
    """Write the files of a message to a folder.

    Raises:
        ValueError: If the message holds anything else.
    """
    found, expected = sizes(content), {f"pack/{name}" for name in names}
    if found.keys() != expected:
        raise ValueError(f"a message holds {sorted(found)}, expected {sorted(expected)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.config_records["pack"].items():
        (folder / name).write_bytes(value)


def sizes(content: RecordDict) -> dict[str, int]:
    """Return record/entry → bytes, of everything in a message.

    Raises:
        TypeError: If an entry is not bytes.
    """
    found = {}
    for record, entries in content.items():
        for name, value in entries.items():
            if not isinstance(value, bytes):
                raise TypeError(f"'{record}/{name}' holds a {type(value).__name__}, expected bytes")
            found[f"{record}/{name}"] = len(value)
    return found


def svi_config(context: Context, root: Path, prior: Path) -> SviConfig:
    """Return the settings that all sites share, for the scans of one and its copy of the prior."""
    shared = {key: value for key, value in context.run_config.items() if key not in ("folder", "sites")}
    return SviConfig.from_mapping(shared | {"members": 1, "root": str(root), "prior_dir": str(prior)})
