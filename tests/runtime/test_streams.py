"""The standard streams of a process: :mod:`s2s.runtime.streams`."""

from __future__ import annotations

import contextlib
import os
import sys
from unittest import mock

from twisted.logger import LogEvent, Logger, LoggingFile, LogLevel
from twisted.trial.unittest import SynchronousTestCase

from s2s.runtime import streams
from s2s.runtime.streams import LONGEST_LINE


class AsyncConnectionTests(SynchronousTestCase):
    """The output of ``print`` in a process whose streams are Twisted's log."""

    def setUp(self) -> None:
        """Replace stdout and stderr as Twisted does."""
        self.events: list[LogEvent] = []
        log = Logger("printed", observer=self.events.append)
        for name, level in (("stdout", LogLevel.info), ("stderr", LogLevel.error)):
            self.patch(sys, name, LoggingFile(log, level, "utf-8"))
        streams.bound_lines()

    def lines(self) -> list[str]:
        """Return the lines that were logged."""
        return [event["log_io"] for event in self.events]

    def test_lines(self) -> None:
        """A line is logged as a whole, even if it was printed in pieces, at the level of its stream."""
        print("a", "b")
        print("c", end="")
        print("d\n\ne", file=sys.stderr)
        print("f")
        self.assertEqual(self.lines(), ["a b", "d", "", "e", "cf"])
        self.assertEqual({event["log_level"] for event in self.events[1:4]}, {LogLevel.error})

    def test_no_end(self) -> None:
        """Output without line ends is logged in lines of a limited length, without loss."""
        for _ in range(3 * LONGEST_LINE):
            print(".", end="")
        print("x" * 5 * LONGEST_LINE, end="")
        self.assertEqual(self.lines(), ["." * LONGEST_LINE] * 3 + ["x" * LONGEST_LINE] * 4)
        print()
        self.assertEqual(self.lines()[-1], "x" * LONGEST_LINE)

    def test_another_stream(self) -> None:
        """A stream that is not Twisted's log is not changed."""
        self.patch(sys, "stdout", sys.__stdout__)
        streams.bound_lines()
        self.assertIs(sys.stdout, sys.__stdout__)


class OfferTests(SynchronousTestCase):
    """:func:`s2s.runtime.streams.offer`."""

    def test_a_reader_that_stands_still(self) -> None:
        """A line for a full pipe is dropped, and one for a pipe with room is written."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        with os.fdopen(writer, "w") as stdout:
            self.patch(sys, "stdout", stdout)
            streams.offer("read")
            self.assertEqual(os.read(reader, 9), b"read\n")
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"x" * 4096)
            os.set_blocking(writer, True)
            streams.offer("unread")


class EncodingTests(SynchronousTestCase):
    """Arguments and variables that are not UTF-8."""

    def test_found(self) -> None:
        """The first wrong value is returned: an argument in escaped form, and a variable by its name only."""
        for argv, variables, wrong in (
            (["caf\u00e9"], {"S2S_A": "\u00e9"}, ""),
            (["x", "caf\udce9"], {}, "caf\\udce9"),
            ([], {"S2S_DATABASE_URL": "secret\udce9"}, "S2S_DATABASE_URL"),
            ([], {"PGUSER": "\udce9"}, "PGUSER"),
            ([], {"OTHER": "\udce9"}, ""),
        ):
            self.patch(sys, "argv", ["s2s", *argv])
            with mock.patch.dict(os.environ, variables):
                self.assertEqual(streams.not_utf8(), wrong)
