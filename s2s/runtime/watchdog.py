"""A watchdog, which ends a process whose reactor is blocked.

Python code in another thread lets the reactor run every 5 ms. C code can hold the interpreter until it returns, as a
regular expression and ``sum(range(10**12))`` do. Until then no peer, no HTTP request and no signal handler gets an
answer, and no Python code can end the call. The kernel can: each second the reactor restarts a timer of CPU time
(``ITIMER_PROF``, setitimer(2)), and the default action of its signal ends the process. Before that,
:mod:`faulthandler`, which does not need the interpreter, writes the stacks of all threads to the log.

A process that is stopped or waits for a core uses no CPU time, so the timer does not advance.

A call that blocks the reactor's thread may also use no CPU time, as ``sock.recv`` does. The interpreter is free then,
so a thread watches the reactor. The thread counts its own waits, and not the time: a process that was stopped for an
hour has missed one wait.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from s2s.runtime import log_file, own_threads, streams

#: Seconds of CPU time without an iteration of the reactor, after which the process is ended. A peer closes its link
#: after about 20 s of silence, and calls in C that take a second or two are common. C threads without the interpreter
#: add CPU time on every core; 3 s for each core leave the reactor 3 s.
HELD_S: Final = max(15.0, 3.0 * (os.cpu_count() or 1))
#: Seconds between two restarts of the timer, and of one wait of the watching thread.
_BEAT_S: Final = 1.0
#: Seconds in waits of the thread without an iteration of the reactor, after which the reactor's stack is logged, and
#: after which the process is ended. A supervisor starts the process again.
BLOCKED_S: Final = 15.0
ENDED_S: Final = 60.0
#: The same as :data:`ENDED_S` while a signal has asked for a stop that the reactor has not begun.
ASKED_S: Final = 10.0
#: The signal of the timer, which ends the process.
SIGNAL: Final = signal.SIGPROF


def meaning(number: signal.Signals) -> str:
    """Return the name of the signal that ended a role, and the reason if it is the watchdog's."""
    reason = (
        f": it computed for {HELD_S:g} s or waited for {ENDED_S:g} s without an answer to anyone;"
        " the end of its log has the stacks"
    )
    return number.name + (reason if number == SIGNAL else "")


class Watchdog:
    """The watchdog of this process. Start it in the reactor's thread, after the fork: a child inherits no timer.

    :param clock: an ``IReactorTime``.
    :param is_asked: returns whether a signal has asked for a stop that the reactor has not begun.
    """

    log = Logger()

    def __init__(self, clock: Any, is_asked: Callable[[], bool] = lambda: False) -> None:
        self._beating = LoopingCall(self._beat)
        self._beating.clock = clock
        self._is_asked = is_asked
        self._log: int | None = None
        self._beats = 0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start watching."""
        # A parent may have set it to be ignored.
        signal.signal(SIGNAL, signal.SIG_DFL)
        self._beating.start(_BEAT_S)
        own_threads.try_start(threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True))

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._beating.running:
            self._beating.stop()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        faulthandler.unregister(SIGNAL)
        self._keep(None)

    def _watch(self, reactor_thread: int) -> None:
        """Watch the reactor from another thread."""
        beats, blocked_s, is_told = self._beats, 0.0, False
        while not self._stopped.wait(_BEAT_S):
            if self._beats != beats:
                beats, blocked_s, is_told = self._beats, 0.0, False
                continue
            if _is_debugged(reactor_thread):
                continue
            blocked_s += _BEAT_S
            if blocked_s >= BLOCKED_S and not is_told:
                is_told = True
                # The blocked thread may hold the lock of the log, so another thread writes.
                own_threads.try_start(
                    threading.Thread(target=self._tell, args=(reactor_thread, blocked_s), daemon=True)
                )
            if blocked_s >= (ASKED_S if self._is_asked() else ENDED_S):
                os.kill(os.getpid(), SIGNAL)

    def _tell(self, thread: int, blocked_s: float) -> None:
        stack = "".join(traceback.format_stack(sys._current_frames().get(thread)))
        text = (
            f"the reactor has not run for {blocked_s:g} s, because a call blocks its thread; after {ENDED_S:g} s the"
            f" process is ended. The stack of the thread:\n{stack}"
        )
        streams.say(text)
        self.log.error("{text}", text=text)

    def _beat(self) -> None:
        self._beats += 1
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


def _is_debugged(thread: int) -> bool:
    """Return whether a debugger of Python, such as pdb, traces a thread, which may wait for its user."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_trace is not None:
            return True
        frame = frame.f_back
    return False


def _without_wait(descriptor: int) -> int:
    """Return a descriptor of the same file that never waits for a reader: a wait would keep the signal from ending us.

    :raises OSError: none is free.
    """
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        # Open the pipe again: O_NONBLOCK on the open descriptor would also apply to other processes.
        with suppress(OSError):  # the pipe may belong to another user
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    return os.dup(descriptor) if streams.has_room(descriptor, 0.0) else os.open(os.devnull, os.O_WRONLY)
