"""The shutdown of a process (docs/protocol.rst, "s2s.engine.shutdown")."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from twisted.internet.error import ReactorNotRunning
from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.roles import shutdown
from s2s.roles.shutdown import CUT_S, GRACE_S, Shutdown
from tests.support.waiting import PATIENCE_S

#: A process to which a signal comes just after the reactor has set its own handlers.
_AT_THE_START = """
import os, signal, sys
from twisted.internet import reactor
from s2s.roles.shutdown import Shutdown

class Told(Shutdown):
    def end(self, why):
        print(why)
        super().end(why)

reactor.addSystemEventTrigger("during", "startup", os.kill, os.getpid(), int(sys.argv[1]))
Told(reactor).watch()
reactor.run()
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""

#: A process whose reactor other code stops, with a handler in hand.
_STOPPED = """
from twisted.internet import reactor
from s2s.roles.shutdown import Shutdown
from twisted.logger import globalLogPublisher, formatEvent

globalLogPublisher.addObserver(lambda event: print(formatEvent(event)) if "grace" in event else None)
lifetime = Shutdown(reactor)
lifetime.in_hand = lambda: "test.run, command 1"
lifetime.watch()
reactor.callWhenRunning(reactor.stop)
reactor.addSystemEventTrigger("before", "shutdown", lambda: print(lifetime.end("again") > 0))
reactor.run()
lifetime.ended()
lifetime._cutting.cancel()
"""


class _Reactor(FakeClock):
    """A reactor that can be stopped once."""

    stops = 0

    def stop(self) -> None:
        self.stops += 1
        if self.stops > 1:
            raise ReactorNotRunning


class _Timer:
    """A timer of a thread that never fires."""

    made: list[_Timer]

    def __init__(self, seconds: float, call: Callable[[], object]) -> None:
        self.seconds = seconds
        self.is_cancelled = False
        self.made.append(self)

    def start(self) -> None:
        """Record the start."""

    def cancel(self) -> None:
        """Record the cancellation."""
        self.is_cancelled = True


class ShutdownTests(SynchronousTestCase):
    """:class:`Shutdown`."""

    def setUp(self) -> None:
        """Create a shutdown with timers of the test."""
        _Timer.made = []
        self.patch(shutdown.threading, "Timer", _Timer)
        self.reactor: Any = _Reactor()
        self.wall = 1000.0
        self.shutdown = Shutdown(self.reactor, lambda: self.wall)
        self.cancelled: list[float] = []
        self.shutdown.on_grace_expired = lambda: self.cancelled.append(self.reactor.seconds())

    @property
    def cut_at(self) -> list[float]:
        """Return the seconds after which the process would exit."""
        return [timer.seconds for timer in _Timer.made if not timer.is_cancelled]

    def test_grace(self) -> None:
        """The reactor is stopped at once; running work is cancelled after the grace; the process exits soon after."""
        self.assertEqual(self.shutdown.end("a test"), 1000 + GRACE_S)
        self.assertEqual((self.reactor.stops, self.cut_at), (1, [GRACE_S + CUT_S]))
        self.reactor.advance(GRACE_S - 0.1)
        self.assertEqual(self.cancelled, [])
        self.reactor.advance(0.1)
        self.assertEqual(self.cancelled, [GRACE_S])

    def test_the_earliest_holds(self) -> None:
        """A later deadline changes nothing and returns the one in force; an earlier one replaces it."""
        self.assertEqual(self.shutdown.end("first", 600), 1600)
        self.assertEqual(self.shutdown.end("second", 700), 1600)
        self.assertEqual(self.shutdown.end("third", 5), 1005)
        self.assertEqual(self.cut_at, [5 + CUT_S])
        self.reactor.advance(5)
        self.assertEqual(self.cancelled, [5])
        self.reactor.advance(700)
        self.assertEqual(self.cancelled, [5])
        self.assertEqual(self.shutdown.end("too late", 1), 1005 - 705)

    def test_steps_of_the_clock(self) -> None:
        """Changes of the wall clock have no effect."""
        self.shutdown.end("first", 600)
        self.wall += 3600
        self.assertEqual(self.shutdown.end("second", 5), 4605)
        self.assertEqual(self.cut_at, [5 + CUT_S])
        self.wall -= 7200
        self.shutdown.end("third", 600)
        self.assertEqual(self.cut_at, [5 + CUT_S])

    def test_ended_in_time(self) -> None:
        """After everything has stopped by itself nothing is cancelled any more."""
        self.shutdown.end("a test", 5)
        self.shutdown.ended()
        self.reactor.advance(10)
        self.assertEqual(self.cancelled, [])

    def test_which_step(self) -> None:
        """The lines at the end of the grace and at the exit name the step that the stop waits for."""
        self.patch(shutdown.os, "_exit", lambda _: None)
        self.shutdown.step = "handlers"
        with capturedLogs() as logs:
            self.shutdown.end("a test", 5)
            self.reactor.advance(5)
            self.shutdown._cut()
        told = [formatEvent(each).partition(":")[0] for each in logs if "unfinished: handlers" in formatEvent(each)]
        self.assertEqual(told, ["the grace period is over", "the shutdown did not finish in time"])

    def test_no_thread(self) -> None:
        """The process also exits in time if the operating system starts no thread for that."""
        left: list[int] = []
        self.patch(shutdown.os, "_exit", left.append)
        self.patch(shutdown, "CUT_S", 0.1)
        self.patch(shutdown.own_threads, "try_start", lambda _: False)
        self.addCleanup(signal.signal, signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        self.shutdown.end("a test", 0.0)
        deadline = time.monotonic() + PATIENCE_S
        while not left and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(left, [0])

    def test_last_words_that_fail(self) -> None:
        """The process also exits with code 0 if the shutdown transaction fails."""
        left: list[int] = []
        self.patch(shutdown.os, "_exit", left.append)
        self.shutdown.shutdown_transaction = lambda: 1 // 0
        self.shutdown._cut()
        self.assertEqual(left, [0])


class ReactorTests(SynchronousTestCase):
    """A reactor that other code stops."""

    def test_other_code_stops_the_reactor(self) -> None:
        """The process takes the same way as after a signal, and its line names the calls in hand."""
        done = subprocess.run(
            [sys.executable, "-c", _STOPPED], capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        line = "stopping within 5 s: other code has stopped the reactor; in hand: test.run, command 1"
        self.assertEqual((done.returncode, done.stdout), (0, f"{line}\nTrue\n"), done.stderr)


class StartTests(SynchronousTestCase):
    """Signals that arrive while the reactor starts."""

    def test_a_signal_at_the_start(self) -> None:
        """A signal at the moment when the reactor has its own handlers causes our shutdown: Twisted's would kill."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number.name):
                done = subprocess.run(
                    [sys.executable, "-c", _AT_THE_START, str(int(number))],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=PATIENCE_S,
                )
                self.assertEqual((done.returncode, done.stdout), (0, f"{number.name}\nset()\n"), done.stderr)
