"""Errors that users can cause and fix. A message is one line: file or setting, finding, expectation."""

from __future__ import annotations

import signal

__all__ = [
    "ConfigError",
    "DataError",
    "Diverged",
    "FolderLocked",
    "FolderTaken",
    "Interrupted",
    "LabelsUnknown",
    "OutOfMemory",
    "PredictionExists",
    "PredictionOutdated",
    "PriorError",
    "ProcessLost",
    "RunError",
    "RunFinished",
    "RunOutdated",
    "RunUnfinished",
    "SourceMissing",
    "UserError",
    "with_task_name",
]


class UserError(Exception):
    """Error in the user's input; the command line prints its message and exits with code 2."""


def with_task_name(task: object, problem: UserError) -> UserError:
    """Return the error of a task, with its name at the start of the message."""
    return problem if str(problem).startswith(f"{task}:") else type(problem)(f"{task}: {problem}")


class DataError(UserError):
    """Scan, mask or folder of scans that cannot be used."""


class ConfigError(UserError):
    """Invalid setting or combination of settings."""


class PriorError(UserError):
    """Kernel bank or kernel prior that cannot be read or does not fit the network."""


class RunError(UserError):
    """Run, posterior or file that cannot be used or written."""


class FolderTaken(RunError):
    """Output folder that holds something else."""


class FolderLocked(RunError):
    """A folder that another process writes to."""


class RunFinished(RunError):
    """Output folder with a finished run."""


class RunUnfinished(RunError):
    """Output folder with an unfinished run, which can be resumed."""


class RunOutdated(RunError):
    """Unfinished run that cannot be resumed: settings, data or version differ, or a file is damaged."""


class PredictionExists(RunError):
    """A prediction that would be replaced."""


class PredictionOutdated(RunError):
    """Prediction that is damaged, of another posterior, or of another version."""


class SourceMissing(RunError):
    """Source networks that are missing, too few or of another architecture than the target network."""


class OutOfMemory(RunError):
    """Device memory exhausted."""


class Diverged(RunError):
    """Training whose loss, gradient or parameters are NaN or infinite."""


class ProcessLost(RunError):
    """Run of several processes, one of which has ended."""


class LabelsUnknown(DataError):
    """Label values without names."""


class Interrupted(KeyboardInterrupt):
    """Received SIGINT or SIGTERM. Not an Exception, because libraries catch those anywhere."""

    #: Whether the run can be resumed; set by `signals.resumable`.
    resumable = False

    def __init__(self, signum: int, *, saved: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (", checkpoint saved" if saved else ""))
        self.signum = signum
