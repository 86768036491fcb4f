"""``s2s up``, with the real roles and the real database."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import psycopg2
from click.testing import CliRunner
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from s2s.cli import main
from s2s.cli.up import supervisor
from s2s.errors import OperatorError
from s2s.runtime.status_log import LINK_UP
from s2s.store import migrations
from s2s.store.embedded import lease
from s2s.store.pool import blocking
from s2s.world import tables as world
from tests.support.http import ask
from tests.support.waiting import poll

_RUN = """
import sys
from pathlib import Path
from s2s.cli.up import supervisor as up
from s2s.errors import OperatorError
state_dir, listen, http, seconds = sys.argv[1:]
try:
    for_seconds = float(seconds) if seconds else None
    code = up.run(Path(state_dir), listen, http, for_seconds, lambda line: print(line, flush=True))
except OperatorError as error:
    code = str(error)
sys.exit(code)
"""


def new_state_dir() -> Path:
    """Create a state directory in the directory of trial."""
    return Path(tempfile.mkdtemp(dir=os.curdir)).resolve()


@cache
def shared_state_dir() -> Path:
    """Create one state directory for all tests, because a new database takes most of a second."""
    return new_state_dir()


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes(state_dir: Path) -> list[list[str]]:
    """Return the command lines of all processes that contain the directory."""
    found = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [argv for argv in found if any(str(state_dir) in word for word in argv)]


class Run:
    """One process of ``s2s up``."""

    def __init__(self, state_dir: Path, listen: str, seconds: str = "", http: str = "") -> None:
        self.json = state_dir / "up.json"
        http = http or f"tcp:{free_port()}:interface=127.0.0.1"
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the run
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _RUN,
                str(state_dir),
                listen,
                http or f"tcp:{free_port()}:interface=127.0.0.1",
                seconds,
            ],
            stdout=self._output,
            stderr=self._output,
        )

    @property
    def output(self) -> str:
        """The whole output of the process."""
        self._output.seek(0)
        return self._output.read()

    def found(self) -> dict[str, Any]:
        """Return the content of ``up.json``, or an empty dictionary without the file."""
        return json.loads(self.json.read_text()) if self.json.exists() else {}

    def linked(self, **other_than: int) -> Deferred[Any]:
        """Wait for an ``up.json`` whose members differ from these values."""

        def look() -> bool:
            found = self.found()
            return bool(found) and all(found[name] != value for name, value in other_than.items())

        return self._unless_ended(look, "up.json is written")

    def says(self, text: str, times: int = 1) -> Deferred[Any]:
        """Wait for a text in the output."""
        return self._unless_ended(lambda: self.output.count(text) >= times, f"it says {text!r}")

    def ended(self) -> Deferred[Any]:
        """Wait for the end of the process."""
        return poll(lambda: self.process.poll() is not None, "s2s up ends")

    def _unless_ended(self, look: Any, what: str) -> Deferred[Any]:
        def checked() -> bool:
            seen = look()
            assert seen or self.process.poll() is None, f"s2s up ended before {what}:\n{self.output}"
            return bool(seen)

        return poll(checked, what)

    def kill(self) -> None:
        """Kill the process, and close its output."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._output.close()


class UpTests(TestCase):
    """:func:`s2s.cli.up.supervisor.run`."""

    def setUp(self) -> None:
        """Choose a state directory and a port."""
        self.state_dir = shared_state_dir()
        self.listen = f"tcp:{free_port()}:interface=127.0.0.1"

    def up(self, *, listen: str = "", seconds: str = "") -> Run:
        """Start an ``s2s up``."""
        run = Run(self.state_dir, listen or self.listen, seconds)
        self.addCleanup(run.kill)
        return run

    def nothing_left(self) -> Deferred[Any]:
        """Wait until no process uses the state directory."""
        return poll(lambda: not processes(self.state_dir), "nothing is left running")

    @inlineCallbacks
    def test_whole_way(self):
        """A run with a time limit sends a broadcast, gets its notice, ends with exit code 0, and leaves no process."""
        run = self.up(seconds="3")
        yield run.ended()
        self.assertEqual(run.process.returncode, 0, run.output)
        self.assertIn("came the whole way", run.output.splitlines()[-1])
        self.assertIn("engine up:", run.output)
        self.assertIn("notice    's2s up was here", run.output)
        self.assertFalse(run.json.exists())
        self.assertEqual(processes(self.state_dir), [])

    @inlineCallbacks
    def test_a_living_world(self):
        """Jobs run, notices appear, and an order from another shell is done and reported."""
        self.state_dir = new_state_dir()
        run = self.up()
        yield run.linked()
        url = run.found()["database"]
        yield run.says("job port_refresh: moved")
        yield run.says("'Ports that are back at their usual stock and price: ")
        order = ["order", "set-sector-status", "5", "port_closed", "--state-dir", str(self.state_dir)]
        typed = yield deferToThread(CliRunner(env={"S2S_DATABASE_URL": None}).invoke, main, order)
        self.assertEqual(typed.exit_code, 0, typed.output)
        # The command uses the HTTP API that ``up.json`` names.
        yield run.says("world.set_sector_status.v1 by 'token:s2s-up'")
        with blocking(url) as txn:
            txn.execute("select status from s2s_world.sectors where sector_id = 5")
            self.assertEqual(txn.fetchone(), ("port_closed",))

    @inlineCallbacks
    def test_the_api(self):
        """``up.json`` names the HTTP API and a private file with an admin's token, which is valid until the end."""
        self.state_dir = new_state_dir()
        tokens, before = [], {}
        for _ in range(2):
            run = self.up()
            yield run.linked(**before)
            path = Path(run.found()["token_file"])
            self.assertTrue(path.is_absolute())
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
            tokens.append(path.read_text().strip())
            answer = yield deferToThread(
                ask, run.found()["http"], "PUT", "/v1/config/relay.window", tokens[-1], {"value": 9}
            )
            self.assertEqual(answer.status, 200)
            if len(tokens) == 1:
                # A killed ``s2s up`` leaves its token; the next one revokes it.
                before = {"server_pid": run.found()["server_pid"]}
                run.process.kill()
                run.process.wait()
        old = yield deferToThread(ask, run.found()["http"], "GET", "/v1/config", tokens[0])
        self.assertEqual(old.status, 401)
        for token in tokens:
            self.assertNotIn(token.partition("~")[2], run.output)
        run.process.terminate()
        yield run.ended()
        self.assertFalse(path.exists())
        self.assertEqual(run.process.returncode, 0)

    @inlineCallbacks
    def test_deaths(self):
        """A killed role is replaced and its pid updated; after a killed ``s2s up`` the next one keeps the world."""
        self.state_dir = new_state_dir()
        first = self.up()
        yield first.linked()
        before = first.found()
        self.assertEqual(sorted(before), ["database", "engine_pid", "http", "link", "server_pid", "token_file"])
        self.assertIn("made a world: 1000 sectors, each with a port, and 10000 ships", first.output)
        with blocking(before["database"]) as txn:
            txn.execute(world.COUNTS.query)
            found = world.Counts(*(txn.fetchone() or ()))
            self.assertEqual((found.sectors, found.ports, found.ships), (1000, 1000, 10_000))
            txn.execute("update s2s_world.sectors set name = 'Home' where sector_id = 1")
        for links, name in enumerate(("engine_pid", "server_pid"), start=2):
            os.kill(before[name], signal.SIGKILL)
            yield first.linked(**{name: before[name]})
            yield first.says(LINK_UP, times=links)
        first.process.kill()
        second = self.up()
        first.process.wait()
        after = first.found()
        yield second.linked(server_pid=after["server_pid"], engine_pid=after["engine_pid"])
        self.assertNotIn("made a world", second.output)
        with blocking(second.found()["database"]) as txn:
            txn.execute("select count(*) from s2s_world.ships")
            self.assertEqual(txn.fetchone(), (10_000,))
            txn.execute("select name from s2s_world.sectors where sector_id = 1")
            self.assertEqual(txn.fetchone(), ("Home",))
        second.process.send_signal(signal.SIGTERM)
        yield second.ended()
        self.assertEqual(second.process.returncode, 0, second.output)
        yield self.nothing_left()

    @inlineCallbacks
    def test_shut_down_for_good(self):
        """An engine that was shut down by an operator is not started again; a killed server is."""
        run = self.up()
        yield run.linked()
        before = run.found()
        argv = [str(Path(sys.executable).with_name("s2s")), "engine", "shutdown", "--state-dir", str(self.state_dir)]
        told = subprocess.run(argv, capture_output=True, text=True, check=False)
        self.assertEqual(told.returncode, 0, told.stderr)
        yield run.says("engine    ended with exit 0, which is final")
        os.kill(before["server_pid"], signal.SIGKILL)
        yield run.linked(server_pid=before["server_pid"])
        self.assertEqual(run.found()["engine_pid"], before["engine_pid"])
        self.assertFalse(psutil.pid_exists(before["engine_pid"]))
        run.process.send_signal(signal.SIGTERM)
        yield run.ended()
        self.assertEqual(run.process.returncode, 0, run.output)

    @inlineCallbacks
    def test_port_in_use(self):
        """A port in use causes one line and exit code 1, and no process is left."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            run = self.up(listen=f"tcp:{other.getsockname()[1]}:interface=127.0.0.1")
            yield run.ended()
        self.assertEqual(run.process.returncode, 1)
        self.assertIn("in use", run.output.splitlines()[-1])
        self.assertNotIn("Traceback", run.output)
        yield self.nothing_left()

    @inlineCallbacks
    def test_a_full_disk(self):
        """If the output cannot be written all processes stop, and the command ends with one line and exit code 1."""
        with open("/dev/full", "w") as full:
            supervisor = subprocess.Popen(
                [str(Path(sys.executable).with_name("s2s")), "up", "--state-dir", str(self.state_dir)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        _, said = yield deferToThread(supervisor.communicate, timeout=60)
        self.assertEqual((supervisor.returncode, said.count("\n")), (1, 1), said)
        self.assertIn("the output cannot be written, No space left on device", said)
        yield self.nothing_left()

    @inlineCallbacks
    def test_told_to_end_before_the_start(self):
        """During the start a signal ends a wait for a database lock, whose holder is named; no process is left."""
        self.state_dir = new_state_dir()
        held = yield deferToThread(lease.join, self.state_dir)
        self.addCleanup(held.leave)
        with closing(psycopg2.connect(held.url)) as holder:
            holder.cursor().execute("select pg_advisory_xact_lock(%s)", (migrations._LOCK,))

            def waiters() -> int:
                with blocking(held.url) as txn:
                    txn.execute("select count(*) from pg_stat_activity where application_name = 's2s up'")
                    return int(txn.fetchone()[0])

            run = self.up()
            yield run.says("waiting for locks: pid")
            run.process.send_signal(signal.SIGTERM)
            yield poll(lambda: waiters() == 0, "it waits no more")
        # The guardian process of PostgreSQL waits for this lease.
        held.leave()
        yield run.ended()
        self.assertEqual(run.process.returncode, 1)
        self.assertEqual(run.output.splitlines()[-1], "interrupted before everything has started")
        yield self.nothing_left()

    def test_a_file_system_without_locks(self):
        """An operating system error without a file name is reported in one line that names --state-dir."""
        for errno_, where in ((errno.ENOLCK, "fcntl.flock"), (errno.ENOSPC, "s2s.cli.up.supervisor._exclusive")):
            with mock.patch(where, side_effect=OSError(errno_, os.strerror(errno_))):
                refused = self.assertRaises(
                    OperatorError, supervisor.run, self.state_dir, "tcp:1", "tcp:2", None, lambda _: None
                )
            self.assertRegex(str(refused), rf"\({os.strerror(errno_)}\): .*--state-dir")

    @inlineCallbacks
    def test_state_directory_in_use(self):
        """A state directory in use by another ``s2s up`` causes one line and exit code 1."""
        with (self.state_dir / "up.lock").open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            run = self.up()
            yield run.ended()
        self.assertEqual(run.process.returncode, 1)
        self.assertRegex(run.output, r"^another s2s up runs in .*--state-dir\n$")


class EndpointTests(SynchronousTestCase):
    """:func:`s2s.cli.up.supervisor.connect_endpoint`."""

    def test_reaches(self) -> None:
        """The endpoint of the engine fits that of the server, with the local host for all interfaces."""
        for listen, connect in {
            "tcp:4321:interface=127.0.0.1": "tcp:host=127.0.0.1:port=4321",
            "tcp:4321": "tcp:host=127.0.0.1:port=4321",
            "tcp:port=4321:interface=0.0.0.0": "tcp:host=127.0.0.1:port=4321",
            r"tcp:4321:interface=\:\:": "tcp:host=127.0.0.1:port=4321",
            r"tcp:4321:interface=\:\:1": r"tcp:host=\:\:1:port=4321",
            "unix:run/s2s.sock": "unix:run/s2s.sock",
            r"unix:address=odd\:name:mode=600": r"unix:odd\:name",
        }.items():
            self.assertEqual(supervisor.connect_endpoint(listen), connect)

    def test_refuses(self) -> None:
        """A listen endpoint without a usable address is refused in one line."""
        for listen in ("tcp:0", "tcp:", "tcp:http", "tcp:65536", "ssl:4321", "unix:", ""):
            self.assertNotIn("\n", str(self.assertRaises(OperatorError, supervisor.connect_endpoint, listen)))

    def test_the_url(self) -> None:
        """The URL of the API fits its listen endpoint, which must be a TCP port."""
        for http, url in {
            "tcp:8321": "http://127.0.0.1:8321",
            "tcp:port=8321:interface=localhost": "http://localhost:8321",
            r"tcp:8321:interface=\:\:1": "http://[::1]:8321",
        }.items():
            self.assertEqual(supervisor.http_url(http), url)
        for http in ("tcp:0", "unix:x", "ssl:8321", "off"):
            self.assertIn("--http", str(self.assertRaises(OperatorError, supervisor.http_url, http)))
