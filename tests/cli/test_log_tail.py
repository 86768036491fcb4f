"""Following a log that another process writes and rotates."""

from __future__ import annotations

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from s2s.cli.up.log_tail import LogTail


class LogTailTests(SynchronousTestCase):
    """:class:`s2s.cli.up.log_tail.LogTail`."""

    def setUp(self) -> None:
        """Choose a path without a file."""
        self.path = Path(self.mktemp())

    def write(self, text: str) -> None:
        """Append to the file at the path."""
        with self.path.open("a") as file:
            file.write(text)

    def test_only_what_comes(self) -> None:
        """Lines from before the start are skipped, and later lines are returned once."""
        self.write("old\n")
        tail = LogTail(self.path)
        self.addCleanup(tail.close)
        self.assertEqual(tail.lines(), [])
        self.write("one\ntwo\n")
        self.assertEqual(tail.lines(), ["one", "two"])
        self.assertEqual(tail.lines(), [])

    def test_file_that_is_not_there_yet(self) -> None:
        """A file that is created later is read from its beginning."""
        tail = LogTail(self.path)
        self.addCleanup(tail.close)
        self.assertEqual(tail.lines(), [])
        self.write("one\n")
        self.assertEqual(tail.lines(), ["one"])

    def test_half_a_line(self) -> None:
        """A line is returned when it is complete, even if a character was split."""
        tail = LogTail(self.path)
        self.addCleanup(tail.close)
        with self.path.open("ab", buffering=0) as file:
            file.write("ü".encode()[:1])
            self.assertEqual(tail.lines(), [])
            file.write("ü".encode()[1:] + b"!\nnext")
            self.assertEqual(tail.lines(), ["ü!"])

    def test_rotation(self) -> None:
        """When the file is renamed and a new one begins, no line is lost, not even those written in between."""
        self.write("old\n")
        tail = LogTail(self.path)
        self.addCleanup(tail.close)
        self.write("last\n")
        self.path.rename(self.path.with_suffix(".1"))
        self.assertEqual(tail.lines(), ["last"])
        self.write("first\n")
        self.assertEqual(tail.lines(), ["first"])

    def test_rotation_between_two_looks(self) -> None:
        """The rest of the old file and the lines of the new one are returned by one call."""
        self.write("old\n")
        tail = LogTail(self.path)
        self.addCleanup(tail.close)
        self.write("last\n")
        self.path.rename(self.path.with_suffix(".1"))
        self.write("first\n")
        self.assertEqual(tail.lines(), ["last", "first"])
