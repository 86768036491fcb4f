"""Stop the process: on a signal, with its parent, on a server's request or before its start. Handle other signals."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

from s2s.errors import OperatorError
from s2s.runtime import log_file, own_threads, stacks, streams
from s2s.runtime.clock import cancel

#: A parent that starts a role with a pipe as stdin sets this environment variable. The role stops when the pipe is
#: closed, also if SIGKILL ended the parent.
STOP_WITH_STDIN: Final = "S2S_STOP_WITH_STDIN"

#: The default grace of a stop, in seconds (protocol, "s2s.engine.shutdown").
GRACE_S: Final = 5.0
#: Seconds for an orderly end after the running SQL is cancelled, and again for the shutdown transaction after that.
CUT_S: Final = 1.5

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: Signals that programs for log rotation send, and that would end the process by default.
_HARMLESS: Final = (signal.SIGUSR1, signal.SIGUSR2)
#: Signals of timers and devices, as of ``signal.alarm`` in a handler, that would end the process without a line.
_STRAY: Final = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGIO)
#: Seconds between two lines about such signals.
_STRAY_S: Final = 60.0
#: Not empty if SIGHUP came before the role started.
_early: Final[list[int]] = []
_log = Logger(namespace="s2s.roles.shutdown")


@implementer(IReadDescriptor)
class _Parent:
    """Reads stdin, and stops the process when stdin ends."""

    def __init__(self, reactor: Any, end: Callable[[str], object]) -> None:
        self._reactor = reactor
        self._end = end

    def fileno(self) -> int:
        return 0

    def doRead(self) -> None:
        if not os.read(0, 4096):
            self._reactor.removeReader(self)
            self._end("the parent process is gone or told us to")

    def connectionLost(self, reason: object) -> None:
        self._end("stdin is gone")

    def logPrefix(self) -> str:
        return "stdin"


class Shutdown:
    """The shutdown of this process, which begins once and ends in bounded time.

    First every component finishes its work in progress. When the grace is over, :attr:`on_grace_expired` is called,
    and the work that still runs is cancelled and rolled back. The process exits :data:`CUT_S` later even if a thread
    still runs, since a thread can be neither cancelled nor joined. The exit code is 0 in any case, and final.

    :ivar on_start: called when a service starts, after the fork.
    :ivar rereads: called in a thread on SIGHUP, one after another; each logs its own errors.
    :ivar on_grace_expired: called in the reactor's thread when the grace is over.
    :ivar in_hand: returns the names of the calls of foreign code that run now, for log lines; empty: none runs.
    :ivar is_asked: a signal has asked for a stop, which has not begun yet.
    :ivar step: the step that the stop waits for now, for log lines.
    :ivar shutdown_transaction: called in another thread just before the process exits without having finished; it may
        block for a second.
    """

    def __init__(self, reactor: Any, now: Callable[[], float] = time.time) -> None:
        self._reactor = reactor
        self._now = now
        self._deadline: float | None = None
        self._cutting: threading.Timer | None = None
        self._cancelling: Any = None
        #: Whether the files are being read again, and whether one more read is to follow.
        self._is_rereading = self._is_asked_again = False
        self._is_hung_up = False
        self._stray_at = float("-inf")
        self._has_terminal = os.isatty(0)
        self.on_start: Callable[[], object] = lambda: None
        self.rereads: list[Callable[[], object]] = []
        self.on_grace_expired: Callable[[], object] = lambda: None
        self.shutdown_transaction: Callable[[], object] = lambda: None
        self.in_hand: Callable[[], str] = lambda: ""
        self.is_asked = False
        self.step = "the stop to begin"

    def watch(self) -> None:
        """Let SIGTERM and SIGINT, and the end of stdin by :data:`STOP_WITH_STDIN`, cause a shutdown with exit code 0.

        SIGHUP reads files again, and SIGQUIT writes the stacks of all threads to the log. A stray signal of a timer
        has a line, and no other effect.

        With Twisted's own handler, which is set when the reactor starts, the process would die of the signal once
        everything is stopped. Call this method when a service starts: after the fork, whose parent must stay killable.
        """

        def on_signal(number: int, _frame: object) -> None:
            self.is_asked = self._deadline is None
            self._reactor.callFromThread(self.end, signal.Signals(number).name)

        def on_hang_up(*_: object) -> None:
            # Many signals in a row cause one call.
            if not self._is_hung_up:
                self._is_hung_up = True
                self._reactor.callFromThread(self._hang_up)

        def on_stray(number: int, _frame: object) -> None:
            # A timer may send thousands a second.
            now = time.monotonic()
            if now >= self._stray_at + _STRAY_S:
                self._stray_at = now
                self._reactor.callFromThread(_tell_stray, signal.Signals(number).name)

        def take_signals() -> None:
            for number in _SIGNALS:
                signal.signal(number, on_signal)
            signal.signal(signal.SIGHUP, on_hang_up)
            for number in _HARMLESS:
                # Keep an existing handler: twistd rotates its log file on SIGUSR1, if it has one.
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, lambda *_: None)
            for number in _STRAY:
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, on_stray)
            stacks.write_on_sigquit()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

        self.on_start()
        take_signals()
        # The reactor sets handlers of its own in the phase "during" of its start, by the first trigger. A signal that
        # arrives at that moment waits for our handlers. No thread starts meanwhile, which would inherit the mask.
        self._reactor.addSystemEventTrigger("before", "startup", signal.pthread_sigmask, signal.SIG_BLOCK, _SIGNALS)
        self._reactor.addSystemEventTrigger("during", "startup", take_signals)
        # Code of a plug-in may stop the reactor. Nothing but our deadlines ends a process in which a thread still runs.
        self._reactor.addSystemEventTrigger("before", "shutdown", self._reactor_stops)
        if _early:
            self._reactor.callWhenRunning(self._hang_up)
        # At its end Python restores the default action of the signals, which kills, unless the signals are ignored.
        atexit.register(_ignore_signals)
        if os.environ.get(STOP_WITH_STDIN):
            self._reactor.callWhenRunning(self._reactor.addReader, _Parent(self._reactor, self.end))

    def _reactor_stops(self) -> None:
        if self._deadline is None:
            self.end("other code has stopped the reactor")

    def _hang_up(self) -> None:
        """Read files again that may have changed. Stop if the terminal is gone, which sends SIGHUP as well."""
        self._is_hung_up = False
        if self._has_terminal and not os.isatty(0):
            self.end("the terminal is gone")
            return
        done = "the log was opened anew; " if log_file.reopen() else ""
        if self._is_rereading:
            self._is_asked_again = True
            return
        _log.info("SIGHUP: {done}the certificates and the file of the database URL are read again", done=done)
        self._is_rereading = True
        reading = own_threads.run(self._reactor, self._reread)
        reading.addErrback(lambda failure: _log.failure("the files could not be read again", failure=failure))
        reading.addCallback(self._has_reread)

    def _reread(self) -> None:
        for reread in self.rereads:
            reread()

    def _has_reread(self, _: object) -> None:
        self._is_rereading = False
        if self._is_asked_again:
            self._is_asked_again = False
            self._hang_up()

    def end(self, why: str, grace_s: float = GRACE_S) -> float:
        """Begin an orderly stop; of all calls' deadlines the earliest applies.

        :param grace_s: seconds for the work in progress.
        :returns: the end of the grace in Unix seconds.
        """
        # The deadline is by the monotonic clock, which no operator sets; the returned value is by the wall clock.
        deadline = self._reactor.seconds() + grace_s
        if self._deadline is not None and self._deadline <= deadline:
            return self._told(self._deadline)
        if self._deadline is None:
            in_hand = self.in_hand()
            _log.info(
                "stopping within {grace:g} s: {why}{more}",
                grace=grace_s,
                why=why,
                more=f"; in hand: {in_hand}" if in_hand else "",
            )
            # Set first, because a reactor that runs no iteration now calls our trigger at once.
            self._deadline = deadline
            self.is_asked = False
            with suppress(ReactorNotRunning):  # stopped by other code
                self._reactor.stop()
        else:
            _log.info("stopping earlier, within {grace:g} s: {why}", grace=grace_s, why=why)
        self._deadline = deadline
        self.ended()
        if self._cutting is not None:
            self._cutting.cancel()
        self._cancelling = self._reactor.callLater(grace_s, self._past)
        self._cutting = threading.Timer(grace_s + CUT_S, self._cut)
        self._cutting.daemon = True
        if not own_threads.try_start(self._cutting):
            signal.signal(signal.SIGALRM, lambda *_: self._cut())
            signal.setitimer(signal.ITIMER_REAL, grace_s + CUT_S)
        return self._told(deadline)

    def _told(self, deadline: float) -> float:
        in_s: float = deadline - self._reactor.seconds()
        return self._now() + in_s

    def ended(self) -> None:
        """Cancel the call of :attr:`on_grace_expired`, for example because everything has stopped by itself."""
        cancel(self._cancelling)

    def _past(self) -> None:
        _log.warn("the grace period is over: running SQL is cancelled; unfinished: {step}", step=self.step)
        self.on_grace_expired()

    def _cut(self) -> None:
        _log.error("the shutdown did not finish in time: exiting now; unfinished: {step}", step=self.step)
        last = threading.Thread(target=self._say_last_words, daemon=True)
        if own_threads.try_start(last):
            last.join(CUT_S)
        os._exit(0)

    def _say_last_words(self) -> None:
        try:
            self.shutdown_transaction()
        except Exception as error:
            _log.error("the shutdown could not be stored in the database: {error!r}", error=error)


def _tell_stray(name: str) -> None:
    _log.warn(
        "{name} came and has no effect: a handler that calls signal.alarm or signal.setitimer causes it, or another"
        " process; use --handler-timeout for a time limit",
        name=name,
    )


def wait_for_start() -> None:
    """Keep SIGHUP and SIGQUIT from ending the process until a role has started."""
    signal.signal(signal.SIGHUP, lambda number, _: _early.append(number))
    stacks.write_on_sigquit()


def _ignore_signals() -> None:
    for number in (*_SIGNALS, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def refuse(why: str) -> NoReturn:
    """End the process before it has started, with one line for the operator.

    The line goes to the log, for a daemon, and to the terminal: Twisted redirects stderr to the log.

    :raises SystemExit: in the foreground, so that no traceback follows.
    :raises OperatorError: in a daemon, since Twisted reports only exceptions to the waiting parent. The parent prints
        the first 100 bytes of the exception after our line, so the exception refers to the line.
    """
    _log.error("{why}", why=why)
    streams.say(f"{os.path.basename(sys.argv[0])}: {why}")
    is_told = streams.leave_terminal()
    # Exit after the grace: Python would wait for threads and atexit functions that a plug-in has left behind.
    leaving = threading.Timer(GRACE_S, os._exit, (1,))
    leaving.daemon = True
    if not own_threads.try_start(leaving):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
    if os.path.samestat(os.fstat(2), os.stat(os.devnull)):
        raise OperatorError("the line above states the reason" if is_told else why)
    raise SystemExit(1)
