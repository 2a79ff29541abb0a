"""Remedies for errors, in terms of command-line options."""

from __future__ import annotations

import re
from collections.abc import Set

from dwp_pyro.runtime import errors

__all__ = ["hint"]

_OVERWRITE = "give --overwrite to start again"

#: Error class → remedies, the first choice first. Quoted are other commands.
_HINTS: dict[type[errors.UserError], tuple[str, ...]] = {
    errors.FolderTaken: ("give another --out",),
    errors.FolderLocked: ("wait for it, stop it, or give another --out", "wait for it, or stop it"),
    errors.RunFinished: ("give another --out, or --overwrite to replace it",),
    errors.RunUnfinished: ("give --resume to continue, or --overwrite to start again", _OVERWRITE),
    errors.RunOutdated: ("resume with what the run started with, or give --overwrite to start again",),
    errors.ProcessLost: ("give --resume to continue",),
    errors.PredictionExists: (
        "give --overwrite to replace it, --resume to keep those with the same settings, or another --out",
    ),
    errors.PredictionOutdated: ("predict it again with 'dwp-pyro predict --overwrite'",),
    errors.SourceMissing: (
        "run 'dwp-pyro fit-prior' and give its folder as --prior-dir, or train without: 'svi --center none', "
        "'finetune --init random'",
        "run 'dwp-pyro fit-prior', or train without: 'svi --center none', 'finetune --init random'",
    ),
    errors.OutOfMemory: ("try a smaller --patch or --batch-size, or --device cpu", "try --device cpu"),
    errors.Diverged: (
        f"{_OVERWRITE}, with a lower --learning-rate or --weight-decay, a larger --prior-scale or --precision float32",
        f"{_OVERWRITE}, with a lower --learning-rate or --weight-decay, or --precision float32",
    ),
    errors.LabelsUnknown: ("name label values with --label-map, for example 1=oedema,2=necrosis,3=enhancing",),
}


def hint(error: errors.UserError, options: Set[str]) -> str:
    """Return the remedy for an error that a command with these `options` ("--out", ...) can follow; "" for none."""
    for remedy in _HINTS.get(type(error), ()):
        if set(re.findall(r"--[a-z-]+", re.sub(r"'[^']*'", "", remedy))) <= options:
            return remedy
    return ""
