"""The end of a process, on a signal, with its parent, by order of the server or before its start; and other signals."""

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

#: Set by whoever starts us with a pipe for stdin: its end is our order to stop, also when it was SIGKILL that ended it.
STOP_WITH_STDIN: Final = "S2S_STOP_WITH_STDIN"

#: What a stop may take, in seconds, where nobody says how long (protocol, "s2s.engine.shutdown").
GRACE_S: Final = 5.0
#: What is left for an orderly end once the running SQL is cancelled, in seconds, and for the last words after it.
CUT_S: Final = 1.5

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: What programs send that rotate logs; it would kill.
_HARMLESS: Final = (signal.SIGUSR1, signal.SIGUSR2)
#: Whether SIGHUP came before the role has started.
_early: Final[list[int]] = []
_log = Logger(namespace="s2s.roles.shutdown")


@implementer(IReadDescriptor)
class _Parent:
    """Stdin, until it ends."""

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
    """The end of this process, which begins once and has an end itself.

    First everything finishes what it has in hand. When the grace is over, :attr:`on_grace_expired` is called, and
    what still runs is cancelled and rolled back. Whatever has not ended a little later is left: a thread can be
    neither cancelled nor joined. The exit code is 0 in any case, and final.

    :ivar on_start: called when a service starts, after the fork.
    :ivar rereads: called in a thread on SIGHUP, one after the other; each tells the log what is wrong.
    :ivar past_grace: called in the reactor's thread.
    :ivar step: what a stop waits for now, for people.
    :ivar last_words: called in another thread just before the process is left; it may block for a second.
    """

    def __init__(self, reactor: Any, now: Callable[[], float] = time.time) -> None:
        self._reactor = reactor
        self._now = now
        self._deadline: float | None = None
        self._cutting: threading.Timer | None = None
        self._cancelling: Any = None
        #: Whether the files are being read again, and whether they are to be once more then.
        self._is_rereading = self._is_asked_again = False
        self._is_hung_up = False
        self._has_terminal = os.isatty(0)
        self.on_start: Callable[[], object] = lambda: None
        self.rereads: list[Callable[[], object]] = []
        self.on_grace_expired: Callable[[], object] = lambda: None
        self.shutdown_transaction: Callable[[], object] = lambda: None
        self.step = "the stop to begin"

    def watch(self) -> None:
        """Take SIGTERM and SIGINT as a shutdown that ends with exit code 0, as the end of stdin where told so.

        SIGHUP reads files again, and SIGQUIT writes the stacks of all threads to the log.

        Twisted's own handler, which it sets when the reactor starts, would let the process die of the signal once all
        is stopped. To be called when a service starts: after the fork, whose parent must stay killable.
        """

        def on_signal(number: int, _frame: object) -> None:
            self._reactor.callFromThread(self.end, signal.Signals(number).name)

        def on_hang_up(*_: object) -> None:
            # A flood of signals comes to one call.
            if not self._is_hung_up:
                self._is_hung_up = True
                self._reactor.callFromThread(self._hang_up)

        def take_signals() -> None:
            for number in _SIGNALS:
                signal.signal(number, on_signal)
            signal.signal(signal.SIGHUP, on_hang_up)
            for number in _HARMLESS:
                # twistd rotates its log file on SIGUSR1, where it has one.
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, lambda *_: None)
            stacks.write_on_sigquit()

        self.on_start()
        take_signals()
        # First of all: until then SIGTERM has the handler that Twisted sets at the start of the reactor.
        self._reactor.callWhenRunning(take_signals)
        if _early:
            self._reactor.callWhenRunning(self._hang_up)
        # Once everything is stopped Python gives the signals back their deadly meaning, unless they are ignored.
        atexit.register(_ignore_signals)
        if os.environ.get(STOP_WITH_STDIN):
            self._reactor.callWhenRunning(self._reactor.addReader, _Parent(self._reactor, self.end))

    def _hang_up(self) -> None:
        """Read again what may have changed; end where our terminal is gone, which sends SIGHUP as well."""
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
        """Stop the process in order; told twice, the earlier deadline holds.

        :param grace_s: seconds for what is in hand.
        :returns: when the grace is over, in Unix seconds.
        """
        # By the monotonic clock, which no operator sets; told by the other one.
        deadline = self._reactor.seconds() + grace_s
        if self._deadline is not None and self._deadline <= deadline:
            return self._told(self._deadline)
        if self._deadline is None:
            _log.info("stopping within {grace:g} s: {why}", grace=grace_s, why=why)
            with suppress(ReactorNotRunning):  # by somebody else
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
        """Everything has stopped by itself: there is nothing to cancel."""
        cancel(self._cancelling)

    def _past(self) -> None:
        _log.warn("the grace is over: cancelling what still runs; the stop waits for {step}", step=self.step)
        self.on_grace_expired()

    def _cut(self) -> None:
        _log.error("not everything ended in time: leaving it; the stop waits for {step}", step=self.step)
        last = threading.Thread(target=self._say_last_words, daemon=True)
        if own_threads.try_start(last):
            last.join(CUT_S)
        os._exit(0)

    def _say_last_words(self) -> None:
        try:
            self.shutdown_transaction()
        except Exception as error:
            _log.error("the end could not be written down: {error!r}", error=error)


def wait_for_start() -> None:
    """Let SIGHUP and SIGQUIT, which would kill, do no harm until a role has started."""
    signal.signal(signal.SIGHUP, lambda number, _: _early.append(number))
    stacks.write_on_sigquit()


def _ignore_signals() -> None:
    for number in (*_SIGNALS, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def refuse(why: str) -> NoReturn:
    """End the process before it has started, with one line for the operator.

    The line goes to the log, where a daemon leaves it, and to the terminal: Twisted's stderr is the log as well.

    :raises SystemExit: in the foreground, so that no traceback follows.
    :raises OperatorError: in a daemon, whose waiting parent Twisted tells of exceptions alone.
    """
    _log.error("{why}", why=why)
    streams.say(f"{os.path.basename(sys.argv[0])}: {why}")
    # Python would wait for what a plug-in has left behind: its threads, and its own with atexit.
    leaving = threading.Timer(GRACE_S, os._exit, (1,))
    leaving.daemon = True
    if not own_threads.try_start(leaving):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
    if os.path.samestat(os.fstat(2), os.stat(os.devnull)):
        raise OperatorError(why)
    raise SystemExit(1)
