"""The log files of twistd: bounded, and opened anew by their paths."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger, globalLogPublisher, textFileLogObserver
from twisted.python.logfile import LogFile
from twisted.trial.unittest import SynchronousTestCase

from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.runtime import log_file, streams
from s2s.store.embedded import postmaster
from tests.support.roles import PATIENCE_S, TWISTD, RoleTestCase, environment, free_port, listen
from tests.support.waiting import poll

_TAC = Path(__file__).parents[2] / "tac"


class LogFileTests(SynchronousTestCase):
    """:mod:`s2s.runtime.log_file`, with an observer as twistd makes it."""

    def setUp(self) -> None:
        """Log to a file, as twistd does."""
        self.directory = Path(tempfile.mkdtemp(dir=os.curdir)).resolve()
        self.path = self.directory / "role.log"
        self.file = LogFile.fromFullPath(str(self.path))
        self.addCleanup(self.file.close)
        observer = textFileLogObserver(self.file)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.log = Logger()
        self.told = os.fdopen(os.memfd_create("stderr"), "w+")
        self.addCleanup(self.told.close)
        self.patch(sys, "__stderr__", self.told)

    def names(self) -> list[str]:
        """List the directory."""
        return sorted(path.name for path in self.directory.iterdir())

    def test_bound(self) -> None:
        """However much is logged, only so many files of so many bytes are kept."""
        log_file.bound(1000, 2)
        for _ in range(100):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1", "role.log.2"])
        self.assertTrue(all(path.stat().st_size < 1200 for path in self.directory.iterdir()))

    def test_files_of_an_unbounded_past(self) -> None:
        """Rotated files that an earlier version kept are removed as soon as the log is rotated."""
        for number in range(1, 31):
            (self.directory / f"role.log.{number}").write_text("old")
        log_file.bound(1000, 2)
        for _ in range(11):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1", "role.log.2"])

    def test_reopen_moved(self) -> None:
        """Where another program has moved the file away, what is logged next stands in a new one."""
        log_file.bound(1000, 2)
        self.log.info("before")
        self.path.rename(self.directory / "moved")
        self.log.info("between")
        log_file.reopen()
        self.log.info("after")
        self.assertIn("between", (self.directory / "moved").read_text())
        self.assertIn("after", self.path.read_text())
        self.assertNotIn("between", self.path.read_text())

    def test_cut_short(self) -> None:
        """A file that another program has cut short goes on at its new end, without a gap."""
        log_file.bound(1000, 2)
        self.log.info("before")
        os.truncate(self.path, 0)
        self.log.info("after")
        text = self.path.read_text()
        self.assertIn("after", text)
        self.assertNotIn("\0", text)

    def test_reopen_in_place(self) -> None:
        """A file that was not moved goes on, with its bound."""
        log_file.bound(1000, 2)
        self.log.info("before")
        log_file.reopen()
        self.log.info("after")
        text = self.path.read_text()
        self.assertIn("before", text)
        self.assertIn("after", text)
        for _ in range(11):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1"])

    def test_reopen_fails(self) -> None:
        """Where no file can be opened anew, the old one is written to, and says why; so does stderr."""
        file = self.path.open()
        self.addCleanup(file.close)
        self.path.unlink()
        self.path.mkdir()
        log_file.reopen()
        self.log.info("after")
        said = file.read()
        self.told.seek(0)
        for text in (said, self.told.read()):
            self.assertIn(f"{self.path} cannot be opened anew", text)
        self.assertIn("after", said)
        self.path.rmdir()

    def test_rotation_fails(self) -> None:
        """A file that cannot be rotated is written to all the same."""
        log_file.bound(100, 2)
        for broken in ("os.rename", "os.access"):
            with self.subTest(broken=broken), mock.patch(broken, side_effect=PermissionError):
                self.log.info("y" * 100)
                self.log.info(broken)
                self.assertIn(broken, self.path.read_text())

    def test_removed(self) -> None:
        """A file that was removed or moved away is written to up to its bound, then its path is opened anew."""
        log_file.bound(1000, 2)
        for leave in (self.path.unlink, partial(self.path.rename, self.directory / "moved")):
            self.log.info("before")
            with self.path.open() as old:
                leave()
                for _ in range(20):
                    self.log.info("x" * 100)
                self.assertLess(len(old.read()), 1200)
            self.assertLess(self.path.stat().st_size, 2000)
            self.assertNotIn("before", self.path.read_text())

    def test_directory_removed(self) -> None:
        """Where the directory was renamed as well, events beyond the size are lost, and are counted once it is back."""
        log_file.bound(1000, 2)
        self.log.info("before")
        away = self.directory.with_name("away")
        self.directory.rename(away)
        for _ in range(20):
            self.log.info("x" * 100)
        self.assertLess((away / "role.log").stat().st_size, 1200)
        self.directory.mkdir()
        self.log.info("after")
        self.assertRegex(self.path.read_text(), "events lost before this line: 1[0-9]: .*No such file.*\n.*after")

    def test_characters_that_are_none(self) -> None:
        """An event that is no UTF-8, as a name of a file may be, is escaped and not lost."""
        log_file.bound(1000, 2)
        # By hand: the log of trial bears no such event.
        self.file.write("a name \udcff of a file\n")
        self.assertIn("a name \\udcff of a file", self.path.read_text())

    def test_a_directory_of_another_user(self) -> None:
        """A file that cannot be rotated is told of at the start, and is written to all the same."""
        with mock.patch("os.access", lambda path, _: str(path) != str(self.directory)):
            log_file.bound(100, 2)
            for number in range(10):
                self.log.info("event {number}", number=number)
        text = self.path.read_text()
        self.assertEqual(text.count("cannot be rotated"), 1)
        self.assertEqual(text.count("event "), 10)

    def test_another_root_directory(self) -> None:
        """So is one whose path leads nowhere, as after a chroot."""
        away = self.directory.with_name(f"{self.directory.name}.away")
        self.directory.rename(away)
        log_file.bound(100, 2)
        for number in range(10):
            self.log.info("event {number}", number=number)
        text = (away / "role.log").read_text()
        self.assertEqual(text.count("cannot be rotated"), 1)
        self.assertEqual(text.count("event "), 10)
        away.rename(self.directory)

    def test_the_limit_of_the_process(self) -> None:
        """A file is rotated before it comes to the size that the process may write."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Before the reports of trial come to it.
        with mock.patch("resource.getrlimit", lambda _: (2000, before[1])):
            log_file.bound(10_000_000, 2)
        for _ in range(100):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1", "role.log.2"])
        self.assertTrue(all(path.stat().st_size < 1300 for path in self.directory.iterdir()))

    def test_reopen_as_a_pipe(self) -> None:
        """A pipe in the place of the file is not opened, which would wait for its reader."""
        log_file.bound(1000, 2)
        self.path.unlink()
        os.mkfifo(self.path)
        self.assertFalse(log_file.reopen())
        self.path.unlink()


class PipeTests(SynchronousTestCase):
    """A log and a stderr that are a pipe, which holds one page."""

    def setUp(self) -> None:
        """Log to a pipe."""
        self.read, self.write = os.pipe()
        fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
        self.pipe = os.fdopen(self.write, "w")
        for end in (self.pipe.close, partial(os.close, self.read)):
            self.addCleanup(end)
        self.patch(streams, "ROOM_S", 1.0)
        self.log = log_file._CountedStream(self.pipe)

    def logged(self) -> str:
        """Read what the pipe holds."""
        return os.read(self.read, select.PIPE_BUF).decode()

    def test_nobody_reads(self) -> None:
        """Events that nobody reads are lost after one short wait, and the next one that is read tells how many."""
        self.log.write("0 first\n")
        began = time.monotonic()
        for number in range(1, 101):
            self.log.write(f"{number} lost\n")
        self.assertLess(time.monotonic() - began, 2.0)
        self.assertEqual(self.logged(), "0 first\n")
        self.log.write("101 read\n")
        told = (
            "101 [s2s.runtime.log_file#error] events lost before this line: 100: "
            "the log could not be written: nobody reads it"
        )
        self.assertEqual(self.logged(), f"{told}\n101 read\n")

    def test_torn(self) -> None:
        """An event of which the pipe took the beginning counts as lost, and the next one begins a line of its own."""
        self.log.write(f"1 {'x' * 5000}\n")
        self.logged()
        self.log.write("2 read\n")
        self.assertRegex(self.logged(), r"\A\n2 .* events lost before this line: 1: .*\n2 read\n\Z")

    def test_slow_reader(self) -> None:
        """An event waits for a reader that is slow, and is whole."""
        self.log.write("1 first\n")
        read = []
        reader = threading.Timer(0.02, lambda: read.extend(self.logged() for _ in range(3)))
        reader.start()
        event = f"2 {'x' * 5000}\n"
        self.log.write(event)
        reader.join()
        self.assertEqual("".join(read), f"1 first\n{event}")

    def test_stderr(self) -> None:
        """A line for a stderr that nobody reads is lost, and whoever says it goes on."""
        self.patch(sys, "__stderr__", self.pipe)
        for _ in range(3):
            streams.say("a line")
        self.assertEqual(self.logged(), "a line\n")


class PostgresLogTests(SynchronousTestCase):
    """:func:`s2s.store.embedded.postmaster.trim_log`."""

    def setUp(self) -> None:
        """Make a log that a process appends to."""
        self.directory = Path(tempfile.mkdtemp(dir=os.curdir)).resolve()
        self.log = self.directory / "postgres.log"
        self.writer = self.log.open("ab", buffering=0)
        self.addCleanup(self.writer.close)
        self.patch(postmaster, "LOG_BYTES", 100)

    def trim(self) -> None:
        """Trim it."""
        postmaster.trim_log(self.directory / "postgres")

    def test_short(self) -> None:
        """A short log is left as it is."""
        self.writer.write(b"x" * 100)
        self.trim()
        self.assertEqual([path.name for path in self.directory.iterdir()], ["postgres.log"])

    def test_long(self) -> None:
        """What a long one holds is moved to the one old file, and the process goes on at its new beginning."""
        for text in (b"a", b"b"):
            self.writer.write(text * 101)
            self.trim()
        self.writer.write(b"next")
        self.assertEqual(self.log.read_bytes(), b"next")
        self.assertEqual(self.log.with_name("postgres.log.1").read_bytes(), b"b" * 101)

    def test_two_at_once(self) -> None:
        """While one process moves it, another leaves it alone, so that nothing is overwritten."""
        self.writer.write(b"x" * 101)

        def copy(source: Path, to: Path) -> None:
            to.write_bytes(source.read_bytes())
            self.trim()

        with mock.patch("shutil.copyfile", copy):
            self.trim()
        self.assertEqual(self.log.with_name("postgres.log.1").read_bytes(), b"x" * 101)

    def test_no_log(self) -> None:
        """Where there is none nothing happens."""
        self.log.unlink()
        self.trim()
        self.assertEqual(list(self.directory.iterdir()), [])


class RoleLogTests(RoleTestCase):
    """The bounds as an operator sets them, with real processes."""

    #: The smallest size; the filling of one file is a test's, so that a line more rotates it.
    _BYTES = 100_000

    @inlineCallbacks
    def rotates(self, *argv: str, log: str, **variables: str) -> Iterator[Deferred[Any]]:
        """See that a server with a full log and a pile of old ones keeps one old file."""
        path = self.directory / log
        path.write_text("x" * self._BYTES)
        for number in range(1, 6):
            (self.directory / f"{log}.{number}").write_text("old")
        http, port = listen(free_port()), free_port()
        variables = {"S2S_LISTEN": listen(port), "S2S_HTTP": http, DATABASE_VARIABLE: self.url, **variables}
        process = subprocess.Popen(
            [TWISTD, "--nodaemon", "--pidfile=", *argv],
            cwd=self.directory,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait, PATIENCE_S)
        self.addCleanup(process.terminate)
        yield poll(lambda: "server listens on" in path.read_text(), "it runs", timeout=PATIENCE_S)
        # A line more, which is the one that rotates.
        process.terminate()
        process.wait(PATIENCE_S)
        kept = sorted(file.name for file in self.directory.glob(f"{log}*"))
        self.assertEqual(kept, [log, f"{log}.1"])

    def test_options(self) -> Deferred[Any]:
        """The options of the role bound the file of twistd's ``--logfile``."""
        return self.rotates("--logfile=s.log", "s2s-server", "--log-bytes=100000", "--log-files=1", log="s.log")

    def test_tac(self) -> Deferred[Any]:
        """Under a tac file the environment does."""
        return self.rotates(
            "--logfile=t.log", f"--python={_TAC / 'server.tac'}", log="t.log", S2S_LOG_BYTES="100000", S2S_LOG_FILES="1"
        )
