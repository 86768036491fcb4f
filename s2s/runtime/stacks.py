"""The stacks of all threads, written to the log on SIGQUIT."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, Final

from twisted.logger import Logger

from s2s.runtime import own_threads

_log: Final = Logger(namespace="s2s.runtime.stacks")
#: Seconds that the interrupted thread waits until its stack is in the log: afterwards it may hold the interpreter for
#: hours, as a regular expression does. The write takes longer only if the same thread was writing to the log.
_WRITTEN_S: Final = 1.0
#: Seconds between two reports, so that a flood of signals leaves time for the work. An earlier signal is deferred.
_PAUSE_S: Final = 0.1


def write_on_sigquit() -> None:
    """Write the stacks on every SIGQUIT from now on; the process continues."""
    due = 0.0
    again: threading.Timer | None = None

    def on_signal(_: int, interrupted: Any) -> None:
        nonlocal due, again
        early_s = due - time.monotonic()
        if early_s <= 0:
            again = None
            _report(interrupted)
            due = time.monotonic() + _PAUSE_S
        elif again is None or not again.is_alive():
            again = threading.Timer(early_s, os.kill, (os.getpid(), signal.SIGQUIT))
            again.daemon = True
            own_threads.try_start(again)

    signal.signal(signal.SIGQUIT, on_signal)


def _report(interrupted: Any) -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {**sys._current_frames(), threading.get_ident(): interrupted}
    stacks = "\n".join(
        f"{names.get(ident, 'a thread of C')} ({ident}):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    )
    # Write in another thread, because the interrupted thread may be writing to the log.
    writer = threading.Thread(target=_write, args=(stacks,), daemon=True)
    if own_threads.try_start(writer):
        writer.join(_WRITTEN_S)


def _write(stacks: str) -> None:
    _log.warn("SIGQUIT: the stacks of all threads:\n{stacks}", stacks=stacks)
