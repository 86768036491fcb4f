"""The log files of twistd: bounded in size and number, and reopened by their paths."""

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
    """:mod:`s2s.runtime.log_file`, with an observer like that of twistd."""

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
        """Return the names of the files in the directory."""
        return sorted(path.name for path in self.directory.iterdir())

    def test_bound(self) -> None:
        """The log keeps a limited number of files of a limited size."""
        log_file.bound(1000, 2)
        for _ in range(100):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1", "role.log.2"])
        self.assertTrue(all(path.stat().st_size < 1200 for path in self.directory.iterdir()))

    def test_files_of_an_unbounded_past(self) -> None:
        """Surplus rotated files from the time before the limit are removed at the next rotation."""
        for number in range(1, 31):
            (self.directory / f"role.log.{number}").write_text("old")
        log_file.bound(1000, 2)
        for _ in range(11):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1", "role.log.2"])

    def test_reopen_moved(self) -> None:
        """After another program has renamed the file, ``reopen`` creates a new one."""
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
        """After another program has truncated the file, events are written at its new end, without a gap."""
        log_file.bound(1000, 2)
        self.log.info("before")
        os.truncate(self.path, 0)
        self.log.info("after")
        text = self.path.read_text()
        self.assertIn("after", text)
        self.assertNotIn("\0", text)

    def test_reopen_in_place(self) -> None:
        """``reopen`` of a file that was not renamed continues it, with its limit of size."""
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
        """If the path cannot be opened, the old file stays in use, and the reason is in it and on stderr."""
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
        """A file that cannot be rotated stays in use."""
        log_file.bound(100, 2)
        for broken in ("os.rename", "os.access"):
            with self.subTest(broken=broken), mock.patch(broken, side_effect=PermissionError):
                self.log.info("y" * 100)
                self.log.info(broken)
                self.assertIn(broken, self.path.read_text())

    def test_removed(self) -> None:
        """A file that was removed or renamed is written up to its limit, and then the path is opened again."""
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
        """If the directory was renamed too, events over the limit are lost, and counted when the directory is back."""
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
        """An event with a surrogate, as in a file name that is not UTF-8, is escaped and not lost."""
        log_file.bound(1000, 2)
        # Write to the file directly, because trial's log cannot encode this event.
        self.file.write("a name \udcff of a file\n")
        self.assertIn("a name \\udcff of a file", self.path.read_text())

    def test_a_directory_of_another_user(self) -> None:
        """A file that cannot be rotated is reported at the start, and stays in use."""
        with mock.patch("os.access", lambda path, _: str(path) != str(self.directory)):
            log_file.bound(100, 2)
            for number in range(10):
                self.log.info("event {number}", number=number)
        text = self.path.read_text()
        self.assertEqual(text.count("cannot be rotated"), 1)
        self.assertEqual(text.count("event "), 10)

    def test_another_root_directory(self) -> None:
        """A file whose path does not exist, as after a chroot, is reported at the start, and stays in use."""
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
        """A file is rotated before it reaches the process's limit of file size."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The real limit would also apply to the logs of trial.
        with mock.patch("resource.getrlimit", lambda _: (2000, before[1])):
            log_file.bound(10_000_000, 2)
        for _ in range(100):
            self.log.info("x" * 100)
        self.assertEqual(self.names(), ["role.log", "role.log.1", "role.log.2"])
        self.assertTrue(all(path.stat().st_size < 1300 for path in self.directory.iterdir()))

    def test_reopen_as_a_pipe(self) -> None:
        """``reopen`` does not open a named pipe, because that would block until it has a reader."""
        log_file.bound(1000, 2)
        self.path.unlink()
        os.mkfifo(self.path)
        self.assertFalse(log_file.reopen())
        self.path.unlink()


class PipeTests(SynchronousTestCase):
    """A log and a stderr that are a pipe with a capacity of one page."""

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
        """Return the content of the pipe."""
        return os.read(self.read, select.PIPE_BUF).decode()

    def test_nobody_reads(self) -> None:
        """Events for a pipe that nobody reads are lost after one short wait; their number precedes the next event."""
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
        """A partially written event counts as lost, and the next event begins a new line."""
        self.log.write(f"1 {'x' * 5000}\n")
        self.logged()
        self.log.write("2 read\n")
        self.assertRegex(self.logged(), r"\A\n2 .* events lost before this line: 1: .*\n2 read\n\Z")

    def test_slow_reader(self) -> None:
        """An event waits for a slow reader, and is written completely."""
        self.log.write("1 first\n")
        read = []
        reader = threading.Timer(0.02, lambda: read.extend(self.logged() for _ in range(3)))
        reader.start()
        event = f"2 {'x' * 5000}\n"
        self.log.write(event)
        reader.join()
        self.assertEqual("".join(read), f"1 first\n{event}")

    def test_stderr(self) -> None:
        """A line for a stderr that nobody reads is lost, and the writer continues."""
        self.patch(sys, "__stderr__", self.pipe)
        for _ in range(3):
            streams.say("a line")
        self.assertEqual(self.logged(), "a line\n")


class PostgresLogTests(SynchronousTestCase):
    """:func:`s2s.store.embedded.postmaster.trim_log`."""

    def setUp(self) -> None:
        """Create a log to which a process appends."""
        self.directory = Path(tempfile.mkdtemp(dir=os.curdir)).resolve()
        self.log = self.directory / "postgres.log"
        self.writer = self.log.open("ab", buffering=0)
        self.addCleanup(self.writer.close)
        self.patch(postmaster, "LOG_BYTES", 100)

    def trim(self) -> None:
        """Trim the log."""
        postmaster.trim_log(self.directory / "postgres")

    def test_short(self) -> None:
        """A log below the limit is not changed."""
        self.writer.write(b"x" * 100)
        self.trim()
        self.assertEqual([path.name for path in self.directory.iterdir()], ["postgres.log"])

    def test_long(self) -> None:
        """The content of a long log moves to the one old file, and the process continues at the log's beginning."""
        for text in (b"a", b"b"):
            self.writer.write(text * 101)
            self.trim()
        self.writer.write(b"next")
        self.assertEqual(self.log.read_bytes(), b"next")
        self.assertEqual(self.log.with_name("postgres.log.1").read_bytes(), b"b" * 101)

    def test_two_at_once(self) -> None:
        """While one process trims the log, another one does nothing, so that no content is overwritten."""
        self.writer.write(b"x" * 101)

        def copy(source: Path, to: Path) -> None:
            to.write_bytes(source.read_bytes())
            self.trim()

        with mock.patch("shutil.copyfile", copy):
            self.trim()
        self.assertEqual(self.log.with_name("postgres.log.1").read_bytes(), b"x" * 101)

    def test_no_log(self) -> None:
        """A missing log is ignored."""
        self.log.unlink()
        self.trim()
        self.assertEqual(list(self.directory.iterdir()), [])


class RoleLogTests(RoleTestCase):
    """The limits as an operator sets them, with real processes."""

    #: Bytes of the limit: its minimum. The test fills one file to it, so that the next line rotates the file.
    _BYTES = 100_000

    @inlineCallbacks
    def rotates(self, *argv: str, log: str, **variables: str) -> Iterator[Deferred[Any]]:
        """Assert that a server with a full log and five old ones keeps one old file."""
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
        # The stop logs another line, which rotates the file.
        process.terminate()
        process.wait(PATIENCE_S)
        kept = sorted(file.name for file in self.directory.glob(f"{log}*"))
        self.assertEqual(kept, [log, f"{log}.1"])

    def test_options(self) -> Deferred[Any]:
        """The options of the role limit the file of twistd's ``--logfile``."""
        return self.rotates("--logfile=s.log", "s2s-server", "--log-bytes=100000", "--log-files=1", log="s.log")

    def test_tac(self) -> Deferred[Any]:
        """In a tac file the environment variables set the limits."""
        return self.rotates(
            "--logfile=t.log", f"--python={_TAC / 'server.tac'}", log="t.log", S2S_LOG_BYTES="100000", S2S_LOG_FILES="1"
        )
