"""What a process inherits of its parent's signals."""

from __future__ import annotations

import signal


def reset() -> None:
    """Undo what a parent may have left: signals that are blocked, and an ignored SIGCHLD, which loses exit codes.

    To be called at the start of the main thread: other threads inherit what it blocks.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
