"""The child processes of ``s2s up``, with small scripts instead of twistd."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from pathlib import Path

from twisted.internet.defer import inlineCallbacks
from twisted.trial.unittest import TestCase

from s2s.cli.up import children
from s2s.errors import OperatorError
from s2s.store.pool import blocking
from tests.support.waiting import poll

#: The beginning of every script: imports, and a function that writes to the log.
_PRELUDE = """#!{python}
import os, signal, sys, time
log = open([word for word in sys.argv if word.startswith("--logfile=")][0].partition("=")[2], "a", buffering=1)
def write(system, text):
    log.write(f"2026-11-22T18:49:35+0000 [{{system}}] {{text}}\\n")
"""


class DatabaseProcessTests(TestCase):
    """:class:`s2s.cli.up.children.DatabaseProcess`."""

    def test_one_that_cannot_start(self):
        """A database that cannot start is refused once; ``stop`` neither reports it as dead nor starts it again."""
        state_dir = Path(self.mktemp())
        (state_dir / "postgres").mkdir(parents=True)
        (state_dir / "postgres" / "PG_VERSION").write_text("9\n")
        said: list[str] = []
        database = children.DatabaseProcess(state_dir, os.open(os.devnull, os.O_RDONLY), said.append)
        self.addCleanup(os.close, database._lock)
        self.assertIn("was made by PostgreSQL 9", str(self.assertRaises(OperatorError, database.start)))
        database.stop()
        self.assertEqual(said, [])

    def database(self) -> children.DatabaseProcess:
        """Create a process in a new state directory."""
        self.state_dir = Path(self.mktemp()).resolve()
        self.state_dir.mkdir()
        self.said: list[str] = []
        database = children.DatabaseProcess(self.state_dir, os.open(os.devnull, os.O_RDONLY), self.said.append)
        self.addCleanup(os.close, database._lock)
        self.addCleanup(database.stop)
        return database

    def test_a_start_that_waits(self):
        """A waiting start reports the cause of the wait, and can be interrupted; its guardian process ends too."""
        database = self.database()

        def check() -> None:
            if self.said:
                raise KeyboardInterrupt

        with (self.state_dir / "postgres.start.lock").open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            self.assertRaises(KeyboardInterrupt, database.start, check)
            guard = database._guard
            database.stop()
        self.assertEqual(self.said, [f"waiting for another process, which starts the PostgreSQL in {self.state_dir}"])
        self.assertEqual(guard.returncode, 1)

    def test_a_second_start(self):
        """A dead guardian is started again without blocking; the server that it left ends with the next guardian."""
        database = self.database()
        url = database.start()
        with (self.state_dir / "postgres.start.lock").open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            database._guard.kill()
            database._guard.wait()
            for _ in range(3):
                database.poll()
            self.assertEqual(self.said, ["died unasked, starts again"])
            self.assertFalse(database._is_ready)
        with blocking(url) as txn:
            txn.execute("select 1")
        database.stop()
        self.assertFalse((self.state_dir / "postgres" / "postmaster.pid").exists())


class RoleProcessTests(TestCase):
    """:class:`s2s.cli.up.children.RoleProcess`."""

    def role(self, script: str) -> children.RoleProcess:
        """Start a role that runs a script."""
        state_dir = Path(self.mktemp()).resolve()
        state_dir.mkdir()
        program = state_dir / "twistd"
        program.write_text(_PRELUDE.format(python=sys.executable) + script)
        program.chmod(0o700)
        self.patch(children, "twistd", lambda: program)
        self.said: list[str] = []
        role = children.RoleProcess(
            "server", ["s2s-server"], state_dir=state_dir, environment={"S2S_X": "42"}, keep=(), say=self.said.append
        )
        self.addCleanup(role.stop)
        role.start()
        return role

    def refused(self, role: children.RoleProcess):
        """Wait for the error of a role's first start."""

        def look() -> str | None:
            try:
                role.poll(first=True)
            except OperatorError as error:
                return str(error)
            return None

        return poll(look, "the role is refused")

    def status_log(self, role: children.RoleProcess, wanted: str):
        """Wait for a status line."""
        return poll(lambda: wanted in [what for _, what in role.status_log()], f"the news {wanted!r}")

    @inlineCallbacks
    def test_news(self):
        """Status lines are returned with their time of day; other log lines are ignored."""
        role = self.role(
            'write("s2s.link#info", "noise"); write("s2s.runtime.status_log#info", "engine up: e"); sys.stdin.read()'
        )
        told = yield poll(lambda: list(role.status_log()), "news")
        self.assertEqual(told, [("18:49:35", "engine up: e")])

    @inlineCallbacks
    def test_environment(self):
        """A role gets its environment variables, and the one that lets it stop with its stdin."""
        role = self.role(
            'write("s2s.runtime.status_log#info", os.environ["S2S_X"] + os.environ["S2S_STOP_WITH_STDIN"])'
        )
        yield self.status_log(role, "421")

    @inlineCallbacks
    def test_killed_is_started_again(self):
        """A role that dies is started again with another pid, and both events are reported."""
        role = self.role('write("s2s.runtime.status_log#info", str(os.getpid())); sys.stdin.read()')
        first = role.pid
        yield self.status_log(role, str(first))
        os.kill(first, signal.SIGKILL)
        yield poll(lambda: role.poll(first=False) or role.pid != first, "another pid")
        yield self.status_log(role, str(role.pid))
        self.assertEqual(self.said, ["died unasked (SIGKILL), starts again in 0.5 s", f"started again, pid {role.pid}"])

    @inlineCallbacks
    def test_exit_0_is_final(self):
        """A role that ends with exit code 0 is not started again."""
        role = self.role("")
        yield poll(lambda: role.poll(first=False) or role.over, "the role is over")
        self.assertIn("final", self.said[0])

    @inlineCallbacks
    def test_failed_role_waits_longer_each_time(self):
        """The delay doubles when a role fails again, and the reason is reported."""
        role = self.role('sys.exit("no luck")')
        yield poll(lambda: role.poll(first=False) or len(self.said) == 3, "the second death")
        self.assertEqual(self.said[0], "died unasked (exit 1: no luck), starts again in 0.5 s")
        self.assertEqual(self.said[2], "died unasked (exit 1: no luck), starts again in 1 s")

    @inlineCallbacks
    def test_first_start_refused(self):
        """The error of a failed first start is the last line of the role's stderr."""
        role = self.role('print("a warning", file=sys.stderr); sys.exit("port 1 is in use: name another")')
        self.assertEqual((yield self.refused(role)), "port 1 is in use: name another")

    @inlineCallbacks
    def test_reason_in_the_log(self):
        """The reason of a role without output is the critical line of its log."""
        role = self.role('write("-#info", "up"); write("-#critical", "cannot"); write("-#info", "down"); sys.exit(1)')
        self.assertEqual((yield self.refused(role)), "cannot")

    @inlineCallbacks
    def test_no_reason(self):
        """A role without output and log lines has its exit code as reason, with a reference to the log."""
        role = self.role("sys.exit(3)")
        self.assertEqual((yield self.refused(role)), "the server ended with exit 3; its log says more")

    @inlineCallbacks
    def test_much_output(self):
        """The file of a role's output is bounded, and its last line is still read."""
        self.patch(children, "_OUTPUT_BYTES", 1000)
        role = self.role(
            'print("x" * 5000, flush=True); write("s2s.runtime.status_log#info", "printed"); sys.stdin.readline(); '
            'print("y" * 70_000); sys.exit("the last line")'
        )
        yield self.status_log(role, "printed")
        role.poll(first=True)
        self.assertEqual(os.fstat(role._output.fileno()).st_size, 0)
        role._process.stdin.write(b"\n")
        role._process.stdin.flush()
        self.assertEqual((yield self.refused(role)), "the last line")

    @inlineCallbacks
    def test_hanging_role_is_killed(self):
        """A role that does not stop in time is killed, and this is reported."""
        self.patch(children, "_ENDS_S", 0.1)
        role = self.role(
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            'write("s2s.runtime.status_log#info", "deaf"); time.sleep(60)'
        )
        yield self.status_log(role, "deaf")
        role.stop()
        self.assertEqual(self.said, ["did not end within 0.1 s and was killed"])
        self.assertRaises(ProcessLookupError, os.kill, role.pid, 0)

    def test_program_missing(self) -> None:
        """A missing twistd is reported with the cure."""
        self.patch(sys, "executable", os.path.abspath("nowhere/python"))
        self.assertIn("pip install", str(self.assertRaises(OperatorError, children.twistd)))
