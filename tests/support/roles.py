"""The two roles as real twistd processes, on a test's database."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.roles.shutdown import STOP_WITH_STDIN
from tests.support.peer import K1, Key, Peer, connect
from tests.support.postgres import DatabaseTestCase, database_url, make_database, template
from tests.support.waiting import PATIENCE_S, poll

TWISTD = str(Path(sys.executable).with_name("twistd"))
#: Program that runs twistd with a wall clock that stands still, for vectors that were signed at one moment.
_AT = """
import sys, time
time.time = lambda at=float(sys.argv.pop(1)): at
from twisted.scripts import twistd
twistd.run()
"""


_found: set[int] = set()


def free_port() -> int:
    """Find a free port, and never the same one twice: the first caller may not listen yet."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _found:
            _found.add(port)
            return port


def listen(port: int) -> str:
    """Return the endpoint on which a server listens."""
    return f"tcp:{port}:interface=127.0.0.1"


def environment(**more: str) -> dict[str, str]:
    """Return our environment without the variables that configure a role, and with the variables of a test."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("S2S_")}
    return {**ours, **more}


def start_process(
    test: TestCase, argv: list[str], *, cwd: Path | None = None, stdout: Any = subprocess.PIPE, **variables: str
) -> subprocess.Popen[str]:
    """Start a process with a clean environment and these variables; it is killed at the end of the test.

    :param stdout: as for ``subprocess.Popen``; stderr is a pipe.
    """

    def kill() -> None:
        process.kill()
        process.communicate()

    process = subprocess.Popen(
        # A background job of a shell ignores SIGINT, and its children inherit that.
        ["env", "--default-signal=INT", *argv],
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    test.addCleanup(kill)
    return process


class Role:
    """The process of one role, which can be started more than once.

    :param argv: the plugin's name and its options.
    :param ready: text that its log contains once it is ready.
    :param at: a Unix second at which its wall clock stands still.
    """

    def __init__(self, argv: list[str], log: Path, url: str, ready: str, at: int | None = None) -> None:
        twistd = [TWISTD] if at is None else [sys.executable, "-c", _AT, str(at)]
        self._argv = [*twistd, "--nodaemon", "--pidfile=", f"--logfile={log}", *argv]
        self._environment: Mapping[str, str] = environment(**{DATABASE_VARIABLE: url, STOP_WITH_STDIN: "1"})
        self._log = log
        self._log_from = 0
        self._ready = ready
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def launch_by(self, twistd: list[str], **variables: str) -> None:
        """From the next start on, use this command instead of twistd, and add these variables to its environment."""
        self._argv = [*twistd, *self._argv[self._argv.index("--nodaemon") :]]
        self._environment = {**self._environment, **variables}

    @property
    def pid(self) -> int:
        """The id of its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Deferred[Any]:
        """Start it, and wait until it is ready."""
        self.launch()
        return self.says(self._ready, self._starts)

    def launch(self) -> None:
        """Start it, and do not wait. Its stdin is our pipe, so that it ends when this process ends."""
        self._starts += 1
        self._process = subprocess.Popen(
            self._argv, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    @property
    def is_running(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code of its last process; negative: the number of the signal that ended it."""
        assert self._process is not None
        return self._process.poll()

    @property
    def log(self) -> str:
        """The text of its log files, from the last :meth:`turn_page` on; twistd may have made several files."""
        older = self._log.parent.glob(f"{self._log.name}.*")
        files = sorted(older, key=lambda file: -int(file.suffix[1:]))
        whole = "".join(file.read_text() for file in (*files, self._log) if file.exists())
        return whole[self._log_from :]

    @property
    def whole_log(self) -> str:
        """The whole text of its log files that still exist."""
        files = self._log.parent.glob(f"{self._log.name}*")
        return "".join(file.read_text() for file in files)

    @property
    def is_frozen(self) -> bool:
        """Whether its process is stopped by a signal."""
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def turn_page(self) -> None:
        """Let :attr:`log` begin at the log's present end."""
        self._log_from += len(self.log)
        self._starts = 0

    def lines(self, text: str) -> list[str]:
        """Return the lines of its log that contain a text."""
        return [line for line in self.log.splitlines() if text in line]

    def says(self, text: str, times: int = 1) -> Deferred[Any]:
        """Wait until its log has at least this number of lines that contain a text."""

        def look() -> bool:
            seen = len(self.lines(text)) >= times
            assert seen or self.is_running, f"it ended with {self.exit_code} before it said {text!r}:\n{self.log}"
            return seen

        return poll(look, f"the log says {text!r}", timeout=PATIENCE_S)

    @property
    def rss(self) -> int:
        """Its resident memory in bytes."""
        assert self._process is not None
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def freeze(self) -> None:
        """Suspend its process."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume its process."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Send SIGTERM, and do not wait."""
        assert self._process is not None
        self._process.terminate()

    def assert_ended_well(self) -> None:
        """Assert that it ends without a further signal, with exit code 0, and that its log has no traceback."""
        assert self._process is not None
        code = self._process.wait(PATIENCE_S)
        assert code == 0, f"exit code {code}:\n{self.log}"
        self.assert_calm()

    def kill(self) -> None:
        """Kill it by SIGKILL, and wait for its end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop it by SIGTERM, and assert that it ends with exit code 0, or was killed, and has logged no traceback."""
        if self._process is None:
            return
        code = self._end(signal.SIGTERM)
        assert code in (0, -signal.SIGKILL), f"exit code {code}:\n{self.log}"
        self.assert_calm()

    def assert_calm(self) -> None:
        """Assert that its log has no traceback, no unhandled error and no secret."""
        for never in ("Traceback", "Unhandled", K1.key_b64):
            assert never not in self.log, f"{never} in its log:\n{self.log}"

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        self.thaw()
        code = self._process.wait(PATIENCE_S)
        self._process.communicate()
        return code


class Server(Role):
    """``twistd s2s-server`` on a port of its own.

    :param endpoint: the endpoint on which it listens, instead of the port.
    :param http: the endpoint of its HTTP API.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        *options: str,
        port: int | None = None,
        at: int | None = None,
        endpoint: str | None = None,
        http: str = "off",
    ) -> None:
        self.port = port or free_port()
        argv = ["s2s-server", "--listen", endpoint or listen(self.port), "--http", http, *options]
        ready = "server listens on" if http == "off" else "HTTP API listens on"  # the last line of the two
        super().__init__(argv, directory / f"server-{self.port}.log", url, ready, at)

    def connect(self, **how: Any) -> Peer:
        """Connect a peer, as an engine."""
        return connect(self.port, **how)


class Engine(Role):
    """``twistd s2s-engine``; it is ready when it has begun to connect, since the listener may belong to the test.

    :param to: the server's port, or an endpoint.
    :param name: name of the engine, and of its log.
    """

    def __init__(self, directory: Path, url: str, to: int | str, *options: str, name: str = "engine-1") -> None:
        endpoint = f"tcp:host=127.0.0.1:port={to}" if isinstance(to, int) else to
        argv = ["s2s-engine", "--connect", endpoint, "--name", name, *options]
        super().__init__(argv, directory / f"{name}.log", url, "engine connects to")


@cache
def _shared_server() -> tuple[str, Server]:
    """Make the server that some tests share, and its database; both end with this process."""
    name = "test_shared_server"
    make_database(name, template())
    directory = Path(tempfile.mkdtemp(prefix="s2s-roles-"))
    server = Server(directory, database_url(name))
    atexit.register(shutil.rmtree, directory)
    atexit.register(server.stop)
    return database_url(name), server


class RoleTestCase(DatabaseTestCase):
    """A test with real roles on a database of its own, in which both roles sign with the key ``k1``."""

    def setUp(self) -> None:
        """Make the database, its key and a temporary directory."""
        super().setUp()
        self.add_key(K1, is_default=True)
        self.directory = Path(tempfile.mkdtemp(prefix="s2s-roles-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def add_key(self, key: Key, role: str = "any", *, is_default: bool = False) -> None:
        """Add a key that is active since the epoch, if it is missing.

        :param is_default: both roles sign with this key, whatever other keys exist.
        """
        self.execute(
            "insert into s2s.s2s_keys (key_id, key_b64, role, is_default_tx, active_from)"
            " values (%s, %s, %s, %s, to_timestamp(0)) on conflict do nothing",
            *key,
            role,
            is_default,
        )

    def server(self, *options: str, **how: Any) -> Server:
        """Make a server, which is stopped at the end of the test."""
        server = Server(self.directory, self.url, *options, **how)
        self.addCleanup(server.stop)
        return server

    def engine(self, to: int | str, *options: str, **how: Any) -> Engine:
        """Make an engine, which is stopped at the end of the test."""
        engine = Engine(self.directory, self.url, to, *options, **how)
        self.addCleanup(engine.stop)
        return engine

    def run_s2s(self, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the console script on the test's database. Blocks."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("s2s")), *argv],
            env=environment(**{DATABASE_VARIABLE: self.url, **variables}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def count(self, table: str) -> int:
        """Count the rows of a table."""
        return int(self.execute(f"select count(*) from {table}")[0][0])


class SharedServerTestCase(RoleTestCase):
    """A test that shares a server and its database with all other such tests: a start takes most of a second.

    :ivar shared: the running server; its tables are empty and its log begins with the test.
    """

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Empty the tables, and start the server if it does not run."""
        self.url, self.shared = _shared_server()
        self._session = None
        # Commands first: a running batch locks its commands until its notices are committed.
        for rows in ("commands", "notices", "idempotency_keys", "s2s_keys where key_id <> 'k1'"):
            self.execute(f"delete from {rows}")
        self.add_key(K1, is_default=True)
        if not self.shared.is_running:
            yield self.shared.start()
        self.shared.turn_page()
        self.addCleanup(self.shared.assert_calm)
