"""The watchdog of CPU time; tests/roles/test_killers.py tests it in a real process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from s2s.runtime import log_file, watchdog
from s2s.runtime.watchdog import Watchdog
from tests.support.waiting import PATIENCE_S

#: A process with the watchdog that computes endlessly, with a stack trace longer than a page.
_COMPUTE = """
from twisted.internet.task import Clock
from s2s.runtime import watchdog
watchdog.HELD_S = 0.3
watchdog.Watchdog(Clock()).start()
def deep(depth):
    if depth:
        deep(depth - 1)
    sum(range(10**12))
deep(90)
"""


class WatchdogTests(SynchronousTestCase):
    """The watchdog with a fake clock, and the timer of this process."""

    def setUp(self) -> None:
        """Start the watchdog."""
        self.time = Clock()
        self.patch(watchdog, "HELD_S", 1000.0)
        self.watchdog = Watchdog(self.time)
        self.watchdog.start()
        self.addCleanup(self.watchdog.stop)

    def left_s(self) -> float:
        """Return the seconds of CPU time until the process would end."""
        return signal.getitimer(signal.ITIMER_PROF)[0]

    def test_each_second(self) -> None:
        """A reactor that iterates resets the timer each second."""
        signal.setitimer(signal.ITIMER_PROF, 500.0)
        self.time.advance(1.0)
        self.assertGreater(self.left_s(), 900.0)

    def test_without_a_log(self) -> None:
        """An error of the log, as during a rotation or without free descriptors, does not stop the watchdog."""
        for error in (OSError("too many open files"), ValueError("closed file"), AttributeError("no file")):

            def fail(error: Exception = error) -> int:
                raise error

            self.patch(log_file, "descriptor", fail)
            signal.setitimer(signal.ITIMER_PROF, 500.0)
            self.time.advance(1.0)
            self.assertGreater(self.left_s(), 900.0)
        self.time.advance(1.0)
        self.assertEqual(len(self.time.getDelayedCalls()), 1)

    def test_stop(self) -> None:
        """A stopped watchdog leaves no timer and no signal handler."""
        self.watchdog.stop()
        self.assertEqual(self.left_s(), 0.0)
        self.assertEqual(self.time.getDelayedCalls(), [])
        self.assertEqual(signal.getsignal(watchdog.SIGNAL), signal.SIG_DFL)

    def test_a_debugger(self) -> None:
        """A thread that a debugger of Python traces does not count as blocked."""

        def tracer(*_: Any) -> Any:
            return tracer

        for trace in (None, tracer):
            begun, done = threading.Event(), threading.Event()

            def wait(begun: threading.Event = begun, done: threading.Event = done) -> None:
                begun.set()
                done.wait(PATIENCE_S)

            def work(trace: Any = trace, wait: Callable[[], None] = wait) -> None:
                sys.settrace(trace)
                wait()

            thread = threading.Thread(target=work)
            thread.start()
            begun.wait(PATIENCE_S)
            self.assertEqual(watchdog._is_debugged(cast("int", thread.ident)), trace is not None)
            done.set()
            thread.join()

    def test_meaning(self) -> None:
        """The watchdog's signal is described with its reason, and every other signal by its name."""
        self.assertIn("without an answer", watchdog.meaning(watchdog.SIGNAL))
        self.assertEqual(watchdog.meaning(signal.SIGKILL), "SIGKILL")


class FullTests(SynchronousTestCase):
    """A process whose stderr is a pipe or a socket that nobody reads."""

    def ends(self, stderr: int) -> None:
        """Assert that the watchdog ends a computing process."""
        process = subprocess.Popen([sys.executable, "-c", _COMPUTE], stderr=stderr, stdout=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertEqual(process.wait(PATIENCE_S), -watchdog.SIGNAL)

    def test_a_full_pipe(self) -> None:
        """The process ends although its stack traces do not fit into the pipe, or only in part."""
        for taken in (0, select.PIPE_BUF):
            with self.subTest(taken=taken):
                read, write = os.pipe()
                self.addCleanup(os.close, read)
                self.addCleanup(os.close, write)
                size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2 * select.PIPE_BUF)
                os.write(write, b"x" * (size - taken))
                self.ends(write)

    def test_a_full_socket(self) -> None:
        """The process ends although its stack traces do not fit into the socket."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    ours.send(b"x" * 4096)
            ours.setblocking(True)
            self.ends(ours.fileno())

    def test_a_pipe_with_room(self) -> None:
        """The stack traces are written to a pipe that is read."""
        done = subprocess.run([sys.executable, "-c", _COMPUTE], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, -watchdog.SIGNAL)
        self.assertIn("most recent call first", done.stderr)
