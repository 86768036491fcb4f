"""A watchdog of CPU time: it ends a process that computes while its reactor stands still.

Python code in another thread lets the reactor run every 5 ms. Code in C can keep the interpreter until it returns, as a
regular expression and ``sum(range(10**12))`` do. Until then no peer, no HTTP request and no signal handler gets an
answer, and no Python code can end the call. The kernel can: the reactor sets a timer of CPU time (``ITIMER_PROF``,
setitimer(2)) again each second, and the default action of its signal ends the process. Before that, the stacks of all
threads are written to the log, by :mod:`faulthandler`, which needs no interpreter.

A process that is stopped or waits for a core uses no CPU time, and is left alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
from contextlib import suppress
from typing import Any, Final

from twisted.internet.task import LoopingCall

from s2s.runtime import log_file, streams

#: Seconds of CPU time without a turn of the reactor, after which the process is ended. A peer cuts its link after about
#: 20 s of silence, and calls in C that take a second or two are common. Threads in C that leave the interpreter alone
#: use time on every core, so that the reactor has at least 3 s.
HELD_S: Final = max(15.0, 3.0 * (os.cpu_count() or 1))
#: Seconds between two settings of the timer.
_BEAT_S: Final = 1.0
#: The signal of the timer, by which the process ends.
SIGNAL: Final = signal.SIGPROF


def meaning(number: signal.Signals) -> str:
    """Return the name of the signal that ended a role, and the reason where it is ours."""
    reason = f": it computed for {HELD_S:g} s without an answer to anyone; the end of its log has the stacks"
    return number.name + (reason if number == SIGNAL else "")


class Watchdog:
    """The watchdog of this process; it starts after the fork, since a child inherits no timer.

    :param clock: an ``IReactorTime``.
    """

    def __init__(self, clock: Any) -> None:
        self._beating = LoopingCall(self._beat)
        self._beating.clock = clock
        self._log: int | None = None

    def start(self) -> None:
        """Watch from now on."""
        # A parent may have left it ignored.
        signal.signal(SIGNAL, signal.SIG_DFL)
        self._beating.start(_BEAT_S)

    def stop(self) -> None:
        """Watch no more."""
        if self._beating.running:
            self._beating.stop()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        faulthandler.unregister(SIGNAL)
        self._keep(None)

    def _beat(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, HELD_S)
        # The log may have been rotated. Its duplicate stays valid until the next beat. Where another thread rotates it
        # now, or descriptors are used up, the last one stays.
        with suppress(OSError, ValueError, AttributeError):
            log = _without_wait(log_file.descriptor())
            faulthandler.register(SIGNAL, log, all_threads=True, chain=True)
            self._keep(log)

    def _keep(self, log: int | None) -> None:
        old, self._log = self._log, log
        if old is not None:
            os.close(old)


def _without_wait(descriptor: int) -> int:
    """Return a descriptor of the same file, which never waits for a reader: the signal would not end the process then.

    :raises OSError: there is none.
    """
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        # The pipe opened once more: O_NONBLOCK of the one that is open would hold for other processes, too.
        with suppress(OSError):  # it may be another user's
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    return os.dup(descriptor) if streams.has_room(descriptor, 0.0) else os.open(os.devnull, os.O_WRONLY)
