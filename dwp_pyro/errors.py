"""The errors a user can cause. Each message is one line that names the culprit and says what to do."""

from __future__ import annotations

import signal

__all__ = ["ConfigError", "DataError", "Interrupted", "PriorError", "RunError", "UserError"]


class UserError(Exception):
    """Something the user can mend; the command line prints the message and exits with code 2."""


class DataError(UserError):
    """A scan, a mask or a folder of scans that cannot be used as it is."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that makes no sense."""


class PriorError(UserError):
    """A kernel bank or a kernel prior that cannot be read, or does not fit the network."""


class RunError(UserError):
    """A run folder that is taken, unfinished, damaged, or made by another command."""


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop: nobody's mistake. No Exception: it comes anywhere, and libraries wrap those.

    Args:
        signum: number of the signal.
        saved: whether a training has saved its checkpoint.
    """

    #: Whether there is something that --resume goes on with; see `signals.resumable`.
    resumable = False

    def __init__(self, signum: int, *, saved: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (", checkpoint saved" if saved else ""))
        self.signum = signum
