"""A CPU-time watchdog, which ends a process that computes while its reactor is blocked.

Python code in another thread lets the reactor run every 5 ms. C code can hold the interpreter until it returns, as a
regular expression and ``sum(range(10**12))`` do. Until then no peer, no HTTP request and no signal handler gets an
answer, and no Python code can end the call. The kernel can: each second the reactor restarts a timer of CPU time
(``ITIMER_PROF``, setitimer(2)), and the default action of its signal ends the process. Before that,
:mod:`faulthandler`, which does not need the interpreter, writes the stacks of all threads to the log.

A process that is stopped or waits for a core uses no CPU time, so the timer does not advance.
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

#: Seconds of CPU time without an iteration of the reactor, after which the process is ended. A peer closes its link
#: after about 20 s of silence, and calls in C that take a second or two are common. C threads without the interpreter
#: add CPU time on every core; 3 s for each core leave the reactor 3 s.
HELD_S: Final = max(15.0, 3.0 * (os.cpu_count() or 1))
#: Seconds between two restarts of the timer.
_BEAT_S: Final = 1.0
#: The signal of the timer, which ends the process.
SIGNAL: Final = signal.SIGPROF


def meaning(number: signal.Signals) -> str:
    """Return the name of the signal that ended a role, and the reason if it is the watchdog's."""
    reason = f": it computed for {HELD_S:g} s without an answer to anyone; the end of its log has the stacks"
    return number.name + (reason if number == SIGNAL else "")


class Watchdog:
    """The watchdog of this process. Start it after the fork, since a child inherits no timer.

    :param clock: an ``IReactorTime``.
    """

    def __init__(self, clock: Any) -> None:
        self._beating = LoopingCall(self._beat)
        self._beating.clock = clock
        self._log: int | None = None

    def start(self) -> None:
        """Start watching."""
        # A parent may have set it to be ignored.
        signal.signal(SIGNAL, signal.SIG_DFL)
        self._beating.start(_BEAT_S)

    def stop(self) -> None:
        """Stop watching."""
        if self._beating.running:
            self._beating.stop()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        faulthandler.unregister(SIGNAL)
        self._keep(None)

    def _beat(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, HELD_S)
        # The log may have been rotated. The duplicated descriptor stays valid until the next beat. If another thread
        # rotates the log now, or no descriptor is free, the previous duplicate stays in use.
        with suppress(OSError, ValueError, AttributeError):
            log = _without_wait(log_file.descriptor())
            faulthandler.register(SIGNAL, log, all_threads=True, chain=True)
            self._keep(log)

    def _keep(self, log: int | None) -> None:
        old, self._log = self._log, log
        if old is not None:
            os.close(old)


def _without_wait(descriptor: int) -> int:
    """Return a descriptor of the same file that never waits for a reader: a wait would keep the signal from ending us.

    :raises OSError: none is free.
    """
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        # Open the pipe again: O_NONBLOCK on the open descriptor would also apply to other processes.
        with suppress(OSError):  # the pipe may belong to another user
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    return os.dup(descriptor) if streams.has_room(descriptor, 0.0) else os.open(os.devnull, os.O_WRONLY)
