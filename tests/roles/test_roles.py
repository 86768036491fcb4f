"""Starting and stopping either role as an operator does, and the messages for the operator's mistakes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from twisted.internet.defer import Deferred, inlineCallbacks

from s2s.errors import OperatorError
from s2s.roles import options
from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.runtime.status_log import LINK_UP
from tests.support.peer import PUSH, command, connect
from tests.support.postgres import database_url, drop_database, make_database
from tests.support.roles import PATIENCE_S, TWISTD, RoleTestCase, environment, free_port, listen
from tests.support.waiting import poll

_TAC = Path(__file__).parents[2] / "tac"
_PASSWORD = "open-sesame"


class StartingTests(RoleTestCase):
    """All the ways to start a role; s2s adds no wrapper between the operator's command and twistd."""

    def setUp(self) -> None:
        """Choose a port."""
        super().setUp()
        self.port = free_port()
        self.engine_name = f"engine-{self.port}"
        self.endpoints = {
            "S2S_LISTEN": f"{listen(self.port)}\n",
            "S2S_HTTP": listen(free_port()),
            "S2S_CONNECT": f"tcp:host=127.0.0.1:port={self.port}",
            "S2S_NAME": self.engine_name,
        }

    def twistd(self, *argv: str, **more: str) -> subprocess.Popen[str]:
        """Start a role in the test's directory, with its output in one pipe."""
        process = subprocess.Popen(
            [TWISTD, *argv],
            cwd=self.directory,
            env=environment(**self.endpoints, **more),
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / f"out-{argv[-1].rpartition('/')[2]}").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.addCleanup(self.gone, process)
        return process

    def gone(self, process: subprocess.Popen[str]) -> None:
        """Assert that a process is gone, whatever the test did; end it in order because of its PostgreSQL."""
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE_S)

    def said(self, name: str) -> str:
        """Return the current content of a file in the directory."""
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    @inlineCallbacks
    def says(self, name: str, text: str, processes: list[subprocess.Popen[str]]) -> Iterator[Deferred[Any]]:
        """Wait until a file contains a text."""

        def look() -> bool:
            said = self.said(name)
            for process in processes:
                assert process.poll() is None or text in said, f"it ended:\n{said}"
            return text in said

        yield poll(look, f"{name} says {text!r}", timeout=PATIENCE_S)

    def ends(self, process: subprocess.Popen[str]) -> None:
        """Assert that a process ends in order on SIGTERM."""
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE_S), 0)

    @inlineCallbacks
    def test_nothing_given(self):
        """Without any option the two roles, in one directory, create a database and a key, and link."""
        server = self.twistd("-n", "s2s-server")
        engine = self.twistd("-n", "s2s-engine")
        yield self.says("out-s2s-server", f"{LINK_UP} {self.engine_name}", [server, engine])
        both = self.said("out-s2s-server") + self.said("out-s2s-engine")
        self.assertEqual(both.count("made a random key: k1"), 1, both)
        self.assertEqual(both.count("no database is named: using the embedded PostgreSQL under"), 2, both)
        self.assertEqual(
            sorted(path.name for path in self.directory.iterdir() if path.is_dir() or path.suffix == ".pid"),
            ["var"],
        )
        self.ends(engine)
        self.ends(server)
        left = [each.info["cmdline"] for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"]]
        self.assertEqual([argv for argv in left if str(self.directory) in " ".join(argv)], [])
        self.assertNotIn("Traceback", self.said("out-s2s-server") + self.said("out-s2s-engine"))

    def test_an_error_in_the_start(self):
        """A role whose start fails ends its process, although its threads already run."""
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "breaks.py").write_text(
            "from s2s.store.listen import Listener\n"
            "def start(self):\n"
            '    raise ValueError("odd")\n'
            "Listener.start = start\n"
        )
        for role in ("s2s-server", "s2s-engine"):
            process = self.twistd("-n", role, PYTHONPATH=str(self.directory), **{DATABASE_VARIABLE: self.url})
            self.assertEqual(process.wait(PATIENCE_S), 1)
            self.assertRegex(self.said(f"out-{role}"), "(?m)^twistd: ValueError: odd$")

    def test_too_few_threads(self):
        """A role for which the operating system starts no threads ends with a line that names the limits."""
        (self.directory / "sitecustomize.py").write_text(
            "import threading\n"
            "def start(self):\n"
            '    raise RuntimeError("can\'t start new thread")\n'
            "threading.Thread.start = start\n"
        )
        for role in ("s2s-server", "s2s-engine"):
            process = self.twistd("-n", role, PYTHONPATH=str(self.directory), **{DATABASE_VARIABLE: self.url})
            self.assertEqual(process.wait(PATIENCE_S), 1)
            said = self.said(f"out-{role}")
            self.assertRegex(said, "(?m)^twistd: this process needs [0-9]+ threads, and .* starts 0: .*TasksMax=")
            self.assertNotIn("Traceback", said)

    @inlineCallbacks
    def test_daemon(self):
        """Without ``-n`` a role runs in the background with files of its own name, and stops on SIGTERM."""
        starting = self.twistd("s2s-server", **{DATABASE_VARIABLE: self.url})
        self.assertEqual(starting.wait(PATIENCE_S), 0, self.said("out-s2s-server"))
        yield self.says("s2s-server.log", "server listens on", [])
        pid = int(self.said("s2s-server.pid"))
        daemon = psutil.Process(pid)
        self.addCleanup(lambda: psutil.pid_exists(pid) and daemon.kill())
        self.assertNotEqual(daemon.ppid(), os.getpid())
        peer = connect(self.port)
        self.addCleanup(peer.close)
        peer.greet()
        self.assertTrue(peer.call(PUSH, command("from afar"))["accepted"])
        yield poll(lambda: self.count("notices") == 1, "the command has run")
        daemon.terminate()
        yield poll(lambda: not (self.directory / "s2s-server.pid").exists(), "its pidfile is gone")
        psutil.wait_procs([daemon], PATIENCE_S)
        self.assertFalse(daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE)
        self.assertIn("Server Shut Down", self.said("s2s-server.log"))
        self.assertNotIn("Traceback", self.said("s2s-server.log"))

    @inlineCallbacks
    def test_tac(self):
        """The tac files start the same roles, configured by the environment alone."""
        processes = [
            self.twistd(f"--pidfile={role}.pid", "-ny", str(_TAC / f"{role}.tac"), **{DATABASE_VARIABLE: self.url})
            for role in ("server", "engine")
        ]
        yield self.says("out-server.tac", f"{LINK_UP} {self.engine_name}", processes)
        for process in reversed(processes):
            self.ends(process)

    @inlineCallbacks
    def test_told_twice(self):
        """A role that gets a second stop signal while it stops goes on stopping in order."""
        server = self.twistd("-n", "s2s-server", **{DATABASE_VARIABLE: self.url})
        yield self.says("out-s2s-server", "server listens on", [server])
        peer = connect(self.port)
        self.addCleanup(peer.close)
        peer.greet()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            server.send_signal(number)
        self.assertEqual(server.wait(PATIENCE_S), 0)
        self.assertNotIn("Traceback", self.said("out-s2s-server"))


class RefusalTests(RoleTestCase):
    """An operator's mistake is one line that names the cure."""

    def refused(self, *mistakes: tuple[str, list[str], dict[str, str]]) -> None:
        """Assert that twistd ends at once with one line on stderr: expected text, arguments, environment."""
        known = {DATABASE_VARIABLE: self.url}
        started = [
            subprocess.Popen(
                [TWISTD, "--pidfile=", *argv],
                cwd=self.directory,
                env=environment(**{**known, **more}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _, argv, more in mistakes
        ]
        for process, (cure, argv, _) in zip(started, mistakes, strict=True):
            self.addCleanup(process.kill)
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
            self.assertNotEqual(process.returncode, 0, argv)
            for never in ("Traceback", _PASSWORD):
                self.assertNotIn(never, stdout + stderr)
            self.assertRegex(stderr, rf"\A[^\n]*{cure}[^\n]*\n\Z", f"{argv}\n{stdout}")

    def test_port_in_use(self):
        """A port that is in use is refused: free it, or choose another --listen."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = listen(other.getsockname()[1])
            free = listen(free_port())
            self.refused(
                ("in use.*--listen", ["-n", "s2s-server", "--listen", taken], {}),
                ("in use.*--http", ["-n", "s2s-server", "--listen", free, "--http", taken], {}),
            )

    def test_port_in_use_for_a_daemon(self):
        """A daemon that cannot listen ends its parent with an error, and leaves the line in its log and no pid file."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            started = subprocess.Popen(
                [TWISTD, "s2s-server", "--listen", listen(other.getsockname()[1])],
                cwd=self.directory,
                env=environment(**{DATABASE_VARIABLE: self.url}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.addCleanup(started.kill)
            _, stderr = started.communicate(timeout=PATIENCE_S)
        self.assertEqual(started.returncode, 1)
        self.assertIn("cannot listen on", stderr)
        self.assertIn("choose another --listen", Path(self.directory, "s2s-server.log").read_text())
        # The daemon process ends a little after its parent.
        return poll(lambda: not Path(self.directory, "s2s-server.pid").exists(), "no pid file is left")

    def test_database(self):
        """An unreadable URL, a missing server or a missing file is refused with --database, and without a password."""
        nowhere = f"postgresql://somebody:{_PASSWORD}@127.0.0.1:{free_port()}/game"
        unreadable = f"postgresql://somebody:{_PASSWORD}@host:port/game"
        self.refused(
            (f"--database and {DATABASE_VARIABLE}", ["-n", "s2s-server"], {DATABASE_VARIABLE: nowhere}),
            ("write postgresql://", ["-n", "s2s-engine"], {DATABASE_VARIABLE: unreadable}),
            ("not/there", ["-n", "s2s-engine", "--database", "@not/there"], {}),
        )

    def test_schema(self):
        """A database without tables of s2s is refused with the command that creates them, and stays empty."""
        name = str(self.execute("select current_database()")[0][0])
        empty = f"{name}_empty"
        make_database(empty)
        self.addCleanup(drop_database, empty)
        without = {DATABASE_VARIABLE: database_url(empty)}
        self.refused(
            ("s2s db migrate", ["-n", "s2s-server"], without),
            ("s2s db migrate", ["-ny", str(_TAC / "engine.tac")], without),
        )

    def test_key(self):
        """Without a key that may sign, such as an ended key, the command that creates one is named."""
        self.execute("update s2s.s2s_keys set role = 'engine'")
        self.refused(("s2s keys add --role server", ["-n", "s2s-server"], {}))
        self.execute("update s2s.s2s_keys set role = 'any', active_to = now()")
        self.refused(
            ("s2s keys add --role server", ["s2s-server"], {}), ("s2s keys add --role engine", ["-n", "s2s-engine"], {})
        )

    def test_a_logger_that_is_not_there(self):
        """A ``--logger`` that cannot be imported or called is refused in one line, in the background as well."""
        wrong = "cannot be used: .*: name a factory"
        self.refused(
            (f"--logger no.such.logger {wrong}", ["-n", "--logger", "no.such.logger", "s2s-server"], {}),
            (f"--logger os.sep {wrong}", ["-n", "--logger", "os.sep", "s2s-engine"], {}),
        )

    def test_a_syslog_that_is_not_there(self):
        """A role whose lines ``--syslog`` would lose is refused with the cure."""
        # The machine of the test may have a syslog daemon: the path is replaced in the processes of the roles.
        path = self.directory / "no-syslog"
        (self.directory / "sitecustomize.py").write_text(
            f"from s2s.roles import options\noptions._SYSLOG = {str(path)!r}\n"
        )
        there = {"PYTHONPATH": str(self.directory)}
        told = f"no syslog daemon listens on {path}: No such file or directory: start one, or leave out --syslog"
        self.refused(
            (told, ["-n", "--syslog", "s2s-server"], there),
            (told, ["-n", "--syslog", "s2s-engine"], there),
            (told, ["-n", "--syslog", "-y", str(_TAC / "server.tac")], there),
        )

    def test_syslog_sockets(self):
        """A syslog that listens on a socket of either kind is taken, and a socket without a listener is refused."""
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            path = str(self.directory / f"log-{kind}")
            self.patch(options, "_SYSLOG", path)
            with socket.socket(socket.AF_UNIX, kind) as daemon:
                daemon.bind(path)
                if kind == socket.SOCK_STREAM:
                    daemon.listen()
                options._check_syslog()
            self.assertIn("refused", str(self.assertRaises(OperatorError, options._check_syslog)))

    def test_options(self):
        """An invalid value of an option is refused with the option and the valid values."""
        small, tac = {"S2S_FRAME_SIZE_LIMIT": "12"}, str(_TAC / "server.tac")
        self.refused(
            ("--frame-size-limit.*4096.*262144", ["-n", "s2s-server", "--frame-size-limit", "4095"], {}),
            ("--executor-workers.*0.*32", ["-n", "s2s-server", "--executor-workers", "many"], {}),
            ("--name.*printable", ["-n", "s2s-engine", "--name", "a b"], {}),
            ("--listen", ["-n", "s2s-server", "--listen", "nonsense:1"], {}),
            ("--http", ["-n", "s2s-server", "--http", "nonsense:1"], {}),
            ("--http-hosts.*without ports", ["-n", "s2s-server", "--http-hosts", "a.example:80"], {}),
            ("S2S_FRAME_SIZE_LIMIT.*4096.*262144", ["-ny", tac], small),
        )
