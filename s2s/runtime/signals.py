"""The signal state that a process inherits from its parent."""

from __future__ import annotations

import signal


def reset() -> None:
    """Reset the inherited signal state: blocked signals, and an ignored SIGCHLD, which loses exit codes.

    Call this at the start of the main thread, because other threads inherit its blocked signals.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
