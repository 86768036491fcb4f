"""Commands that kill their process, and a process that is stopped while a command runs."""

from __future__ import annotations

import os
import signal
import time
from unittest import mock

import psutil
from twisted.internet.defer import inlineCallbacks

from tests.support.roles import RoleTestCase, Server
from tests.support.waiting import pause, poll

#: A plug-in of a user, with commands that kill and commands that do not. It also shortens the reaper's interval.
_PLUGIN = """
import multiprocessing, os, re, signal, socket, time
from twisted.internet import reactor
from s2s.roles.server import reaper
from s2s.runtime import watchdog
from s2s.handlers.commands import CommandHandler

reaper.REAP_S, reaper.SURE_S = 0.1, 0.5
watchdog.HELD_S, watchdog._BEAT_S = 1.5, 0.2


ours, theirs = socket.socketpair()


def wait_for_a_byte():
    ours.recv(1)


class Careless(CommandHandler):
    cmd_type = "test.careless"
    schema = {"type": "object"}

    def run(self, txn, command):
        txn.execute("insert into public.effects values (%s)", (command.idem_key,))
        match command.payload.get("end"):
            case "exit":
                os._exit(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep in the database":
                txn.execute("set local statement_timeout = 0; select pg_sleep(60)")
            case "sleep in Python":
                time.sleep(60)
            case "fork and exit" | "fork and fail" as end:
                child = os.fork()
                if child == 0:
                    raise SystemExit(0) if end == "fork and exit" else ValueError("in the child")
                os.waitpid(child, 0)
            case "leave a child":
                multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,)).start()
            case "stop by a signal":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(600)
            case "stop the reactor":
                reactor.callFromThread(reactor.stop)
                time.sleep(600)
            case "block the reactor" | "block the reactor for long" as end:
                watchdog.BLOCKED_S, watchdog.ASKED_S = 0.6, 1.2
                watchdog.ENDED_S = 1.2 if end == "block the reactor" else 600
                reactor.callFromThread(wait_for_a_byte)
                time.sleep(600)
            case "watch closely":
                watchdog.ENDED_S = 4
            case "hold the interpreter":
                re.match("(a+)+$", "a" * 64 + "!")
            case "compute in Python":
                until = time.thread_time() + 2 * watchdog.HELD_S
                while time.thread_time() < until:
                    pass


careless = Careless()
"""
_DIED = "ProcessDied: the process ended while this command ran alone"


class KillerTests(RoleTestCase):
    """A server, started again after each death."""

    def setUp(self) -> None:
        """Create the plug-in and the table of effects, without a constraint that would hide a second effect."""
        super().setUp()
        self.execute("create table public.effects (idem_key text)")
        self.keep_charged()
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "careless.py").write_text(_PLUGIN)

    def insert(self, *keys: str, end: str = "") -> None:
        """Insert commands that are due."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload)"
            " select 'test.careless', key, jsonb_build_object('end', %s) from unnest(%s) key",
            end,
            list(keys),
        )

    def state(self, key: str) -> tuple[str, int]:
        """Return a command's status and attempts."""
        ((status, attempts),) = self.execute("select status, attempts from s2s.commands where idem_key = %s", key)
        return status, attempts

    def rush(self) -> None:
        """Make every waiting command due, the killer before all others that failed."""
        self.execute("update s2s.commands set due_at = now() - attempts * interval '1 s' where status = 'ready'")

    @inlineCallbacks
    def dies_of(self, server: Server, attempts: int, status: str = "ready"):
        """Wait until the server dies, start it again, and assert that the killer is charged once for the death."""
        yield poll(lambda: not server.is_running, "the death")
        self.assertEqual(self.state("killer"), ("ready", attempts - 1))
        yield server.start()
        yield poll(lambda: self.state("killer") != ("ready", attempts - 1), "the charge")
        self.assertEqual(self.state("killer"), (status, attempts))
        yield poll(lambda: self.count("batch_notes") == 0, "no note is left")
        self.assertTrue(server.is_running)

    def careless_server(self) -> Server:
        """Create a server with the plug-in."""
        with mock.patch.dict(os.environ, PYTHONPATH=str(self.directory)):
            return self.server("--executor-workers", "2")

    @inlineCallbacks
    def test_a_child_that_is_left(self):
        """A child that a handler leaves holds neither port nor pid file nor session of a killed server, and obeys."""
        server = self.careless_server()
        yield server.start()
        self.insert("parent", end="leave a child")
        yield poll(lambda: self.state("parent")[0] == "done", "the child is there")
        [child] = [each for each in psutil.Process(server.pid).children() if each.status() != psutil.STATUS_ZOMBIE]
        self.addCleanup(child.kill)
        sockets = [each.fd for each in child.net_connections("all") if each.laddr]
        self.assertEqual(sockets, [])
        server.kill()
        theirs = "select count(*) from pg_stat_activity where application_name like 's2s-server%'"
        yield poll(
            lambda: self.execute(f"{theirs} and datname = current_database()") == [(0,)], "its sessions have ended"
        )
        yield server.start()
        self.assertTrue(child.is_running())
        child.terminate()
        yield poll(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child has ended")

    @inlineCallbacks
    def goes_dead(self, end: str):
        """Insert a killer among others, let it kill three times, and assert the final state."""
        server = self.careless_server()
        others = [f"other {number}" for number in range(20)]
        self.insert(*others[:10])
        self.insert("killer", end=end)
        self.insert(*others[10:])
        yield server.start()
        # All commands were in one batch, and are charged alike.
        yield self.dies_of(server, 1)
        self.assertEqual(self.execute("select deaths from s2s.commands where idem_key = 'killer'"), [(1,)])
        self.execute("update s2s.commands set attempts = 9 where idem_key = 'killer'")
        self.rush()
        yield self.dies_of(server, 10)
        self.rush()
        yield self.dies_of(server, 11, "dead")
        self.assertEqual(self.execute("select deaths from s2s.commands where idem_key = 'killer'"), [(1,)])
        self.assertEqual(self.execute("select error from s2s.commands where idem_key = 'killer'"), [(_DIED,)])

        def all_done() -> bool:
            self.rush()
            return {self.state(other)[0] for other in others} == {"done"}

        yield poll(all_done, "all others are done")
        self.assertEqual(sorted(key for (key,) in self.execute("select * from public.effects")), sorted(others))
        self.assertLessEqual(max(self.state(other)[1] for other in others), 3)
        # The server goes on as before.
        self.insert("one more")
        yield poll(lambda: self.state("one more")[0] == "done", "the next command")

    def test_exit(self):
        """A command that ends its process is charged, dead after ten attempts, and all others run once."""
        return self.goes_dead("exit")

    def test_kill(self):
        """A command whose process is killed by a signal is charged likewise."""
        return self.goes_dead("kill")

    @inlineCallbacks
    def test_a_fork_that_goes_on(self):
        """A process that a handler forks and does not end never goes on as a copy of the server on its connections."""
        server = self.careless_server()
        self.insert("before")
        self.insert("exits", end="fork and exit")
        self.insert("fails", end="fork and fail")
        self.insert("after")
        yield server.start()
        keys = ("before", "exits", "fails", "after")
        yield poll(lambda: all(self.state(key)[0] == "done" for key in keys), "the commands")
        self.assertEqual([self.state(key) for key in keys], [("done", 0)] * 4)
        self.assertEqual(sorted(key for (key,) in self.execute("select * from public.effects")), sorted(keys))
        self.assertEqual(psutil.Process(server.pid).children(), [])

    @inlineCallbacks
    def test_hold_the_interpreter(self):
        """A handler that holds the interpreter in C costs its process, which logs where, and not the next commands."""
        server = self.careless_server()
        self.insert("killer", end="hold the interpreter")
        yield server.start()
        yield poll(lambda: not server.is_running, "the death")
        self.assertEqual(server.exit_code, -signal.SIGPROF)
        yield self.dies_of(server, 1)
        self.assertRegex(server.whole_log, r'File ".*careless\.py", line \d+ in run\b')
        self.insert("other")
        yield poll(lambda: self.state("other")[0] == "done", "the next command")

    @inlineCallbacks
    def stops(self, end: str, line: str):
        """Let a command stop its server twice, and assert that it is charged only for the fourth stop, alone."""
        server = self.careless_server()
        self.insert("other")
        self.insert("killer", end=end)
        self.execute("update s2s.commands set stops = 2 where idem_key = 'killer'")
        yield server.start()
        for _ in range(2):
            yield poll(lambda: not server.is_running, "the stop")
            server.assert_ended_well()
            self.assertRegex(server.log, line)
            self.rush()
            server.turn_page()
            yield server.start()
        yield poll(lambda: self.state("killer") == ("ready", 1), "the charge")
        [(error, runs_alone)] = self.execute("select error, runs_alone from s2s.commands where idem_key = 'killer'")
        self.assertIn("4 times the process was stopped", error)
        self.assertTrue(runs_alone)
        self.assertEqual(self.execute("select attempts from s2s.commands where idem_key = 'other'"), [(0,)])
        self.execute("update s2s.commands set status = 'dead' where idem_key = 'killer'")

    def test_stop_by_a_signal(self):
        """A command that stops its process by a signal is named in the log, and charged after several stops."""
        return self.stops("stop by a signal", r"stopping within 5 s: SIGTERM; in hand: test\.careless, command 2\b")

    def test_stop_the_reactor(self):
        """A command that stops the reactor has the process stop in the same way, in the same time."""
        return self.stops("stop the reactor", r"stopping within 5 s: other code has stopped the reactor; in hand: test")

    @inlineCallbacks
    def test_block_the_reactor(self):
        """A call that blocks the reactor without using the CPU costs its process, which logs where, and is charged."""
        server = self.careless_server()
        self.insert("killer", end="block the reactor")
        yield server.start()
        yield poll(lambda: not server.is_running, "the death")
        self.assertEqual(server.exit_code, -signal.SIGPROF)
        self.assertRegex(
            server.whole_log, r'has not run for [0-9.]+ s(.*\n)+.*careless\.py", line \d+, in wait_for_a_byte'
        )
        yield self.dies_of(server, 1)

    @inlineCallbacks
    def test_told_to_end_while_the_reactor_is_blocked(self):
        """SIGTERM also ends a process whose reactor is blocked, soon after the grace."""
        server = self.careless_server()
        self.insert("killer", end="block the reactor for long")
        yield server.start()
        yield poll(lambda: "the reactor has not run" in server.whole_log, "the line")
        server.terminate()
        yield poll(lambda: not server.is_running, "the death")
        self.assertEqual(server.exit_code, -signal.SIGPROF)
        self.execute("update s2s.commands set status = 'dead'")
        yield server.start()

    @inlineCallbacks
    def test_stand_still_for_long(self):
        """A process that was stopped for longer than its reactor may be blocked goes on."""
        server = self.careless_server()
        yield server.start()
        self.insert("watcher", end="watch closely")
        yield poll(lambda: self.state("watcher")[0] == "done", "the short bound")
        server.freeze()
        yield pause(5)
        server.thaw()
        self.insert("other")
        yield poll(lambda: self.state("other")[0] == "done", "the next command")
        self.assertTrue(server.is_running)

    @inlineCallbacks
    def test_compute_and_stand_still(self):
        """Neither a handler that computes in Python nor a stop by a supervisor ends the process."""
        server = self.careless_server()
        self.insert("busy", end="compute in Python")
        yield server.start()
        yield poll(lambda: self.state("busy")[0] == "done", "the end of the computation")
        server.freeze()
        yield pause(2.5)
        server.thaw()
        self.insert("other")
        yield poll(lambda: self.state("other")[0] == "done", "the next command")
        self.assertTrue(server.is_running)

    @inlineCallbacks
    def ends_in_time(self, end: str):
        """Stop a server while a command sleeps, and assert that the command has no effect."""
        server = self.careless_server()
        yield server.start()
        self.insert("sleeper", end=end)
        running = (
            "select 1 from pg_stat_activity where application_name = 's2s-server handlers' and query ~ %s"
            " and xact_start < now() - interval '0.2 s'"
        )
        yield poll(lambda: self.execute(running, "pg_sleep|insert into public.effects"), "it sleeps")
        began = time.monotonic()
        server.terminate()
        yield poll(lambda: not server.is_running, "the end")
        # The grace, the time after it, and a margin for a busy machine.
        self.assertTrue(5 <= time.monotonic() - began < 10)
        server.assert_ended_well()
        self.assertEqual(self.state("sleeper"), ("ready", 0))
        # A session that ends with its process may hold its command a moment longer: the next server counts the stop.
        self.assertEqual(self.execute("select count(*) from s2s.batch_notes where not stopped"), [(0,)])
        self.assertEqual(self.count("effects"), 0)

    def test_told_to_end_while_a_command_is_in_sql(self):
        """After the grace running SQL is cancelled and rolled back; no command is charged, and the exit code is 0."""
        return self.ends_in_time("sleep in the database")

    def test_told_to_end_while_a_command_is_in_python(self):
        """A handler that cannot be cancelled is abandoned; its work is rolled back, and no command is charged."""
        return self.ends_in_time("sleep in Python")
