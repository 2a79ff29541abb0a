"""Remedies for errors, in terms of command-line options."""

from __future__ import annotations

from dwp_pyro.runtime import errors

__all__ = ["hint"]

_OVERWRITE = "give --overwrite to start again"

#: Error class → remedy.
_HINTS: dict[type[errors.UserError], str] = {
    errors.FolderTaken: "give another --out",
    errors.RunFinished: "give another --out, or --overwrite to replace it",
    errors.RunUnfinished: "give --resume to continue, or --overwrite to start again",
    errors.RunOutdated: _OVERWRITE,
    errors.PredictionOutdated: "give --overwrite to predict again, or --resume to keep what is complete",
    errors.SourceMissing: "run 'dwp-pyro fit-prior' and give its folder as --prior-dir, or train without: "
    "svi --center none, finetune --init random",
    errors.OutOfMemory: "try a smaller --patch or --batch-size, or --device cpu",
    errors.Diverged: f"{_OVERWRITE}, with a lower --learning-rate or --weight-decay, a larger --prior-scale or "
    "--precision float32",
    errors.LabelsUnknown: "name label values with --label-map, for example 1=oedema,2=necrosis,3=enhancing",
}


def hint(error: errors.UserError) -> str:
    """Return the remedy for an error; "" if its message has one."""
    return _HINTS.get(type(error), "")
