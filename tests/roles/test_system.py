"""Roles and the operating system: pid files, signals, streams, and files that change under a running role."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from twisted.internet.defer import inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.roles import certs
from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.runtime.status_log import LINK_UP
from tests.roles.test_endpoints import connect_tls, listen_tls, make_certificates
from tests.support.roles import PATIENCE_S, TWISTD, RoleTestCase, free_port, listen, start_process
from tests.support.waiting import poll

#: A plug-in that lets the reactor's thread hang.
_STUCK = """
import re
from twisted.internet import reactor
from twisted.logger import Logger

def hang_for_hours():
    Logger().info("hangs from now on")
    re.match("([a-z]+)+$", 64 * "a" + "!")

reactor.callWhenRunning(reactor.callLater, 0.1, hang_for_hours)
"""


class TwistdTestCase(RoleTestCase):
    """Starts a server as an operator does, in the test's directory."""

    def twistd(self, *argv: str, cwd: Path | None = None, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start ``twistd ARGV s2s-server``, on ports of its own."""
        server = [TWISTD, *argv, "s2s-server", "--listen", listen(free_port()), "--http", "off"]
        return start_process(self, server, cwd=cwd or self.directory, stdout=stdout, **{DATABASE_VARIABLE: self.url})

    def refused(self, *argv: str, cwd: Path | None = None, stdout: Any = subprocess.PIPE) -> str:
        """Assert that a start ends with one line and exit code 1, and return the line."""
        process = self.twistd(*argv, cwd=cwd, stdout=stdout)
        _, said = process.communicate(timeout=PATIENCE_S)
        self.assertEqual(process.returncode, 1, said)
        self.assertEqual(said.count("\n"), 1, said)
        return said

    def ends(self, process: subprocess.Popen[str]) -> str:
        """Assert that a role ends in order, and return its errors."""
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE_S)
        self.assertEqual(process.returncode, 0, said)
        self.assertNotIn("Traceback", said)
        return said

    def says(self, name: str, text: str, times: int = 1) -> Any:
        """Wait until a file of the directory has a text."""
        path = self.directory / name

        def look() -> bool:
            return path.exists() and path.read_text().count(text) >= times

        return poll(look, f"{name} says {text!r}", timeout=PATIENCE_S)


class PidFileTests(TwistdTestCase):
    """Pid files that are outdated after a restart of a container or a crash."""

    @property
    def file(self) -> Path:
        """The pid file of a daemon."""
        return self.directory / "s2s-server.pid"

    @inlineCallbacks
    def daemon(self) -> Any:
        """Start a daemon, and return its process, which ends with the test."""
        starting = self.twistd()
        _, said = yield deferToThread(starting.communicate)
        self.assertEqual(starting.returncode, 0, said)
        daemon = psutil.Process(int(self.file.read_text()))
        self.addCleanup(self.killed, daemon)
        yield self.says("s2s-server.log", "server listens on")
        return daemon

    def killed(self, daemon: psutil.Process) -> None:
        """Kill a daemon that still runs."""
        if daemon.is_running():
            daemon.kill()
        psutil.wait_procs([daemon], PATIENCE_S)

    @inlineCallbacks
    def test_the_foreground_has_none(self) -> Any:
        """In the foreground no file is written, and a file left behind by pid 1 does no harm."""
        self.file.write_text("1")
        (self.directory / "twistd.pid").write_text("1")
        process = self.twistd("-n", "--logfile=log")
        yield self.says("log", "server listens on")
        self.ends(process)
        self.assertEqual(self.file.read_text(), "1")

    @inlineCallbacks
    def test_a_stale_file(self) -> Any:
        """A file of a dead process, whose pid another program has now, is taken over, and removed at the end."""
        for left in (str(os.getpid()), "1", "", "\0" * 8):
            self.file.write_text(left)
            daemon = yield self.daemon()
            self.assertNotEqual(daemon.pid, os.getpid())
            daemon.terminate()
            yield poll(lambda: not self.file.exists(), "the file is removed", timeout=PATIENCE_S)
            psutil.wait_procs([daemon], PATIENCE_S)
            (self.directory / "s2s-server.log").unlink()

    def test_a_taken_port(self) -> None:
        """A daemon whose start is refused writes the whole line to the terminal, before the cut one of twistd."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            where = listen(taken.getsockname()[1])
            argv = [TWISTD, "s2s-server", "--listen", where, "--http", "off"]
            process = start_process(self, argv, cwd=self.directory, **{DATABASE_VARIABLE: self.url})
            _, said = process.communicate(timeout=PATIENCE_S)
        self.assertEqual(process.returncode, 1)
        line, *more = said.splitlines()
        self.assertTrue(line.startswith(f"twistd: cannot listen on {where}: "), said)
        self.assertTrue(line.endswith("Address already in use: free it or choose another --listen"), said)
        self.assertEqual(
            more,
            [
                "An error has occurred: b's2s.errors.OperatorError: the line above states the reason'",
                "Please look at log file for more information.",
            ],
        )

    def test_a_log_that_is_no_file(self) -> None:
        """A pipe as the log file is refused with the way to log to stdout, also a named pipe without a reader."""
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        for path in ("/dev/stdout", fifo):
            self.assertIn("leave --logfile out", self.refused("-n", f"--logfile={path}"))

    def test_a_full_disk(self) -> None:
        """A disk without room for the pid causes one line, and no empty file is left."""
        script = ["/bin/sh", "-c", 'ulimit -f 0; exec "$0" -n --pidfile=p.pid s2s-server', TWISTD]
        done = subprocess.run(script, cwd=self.directory, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn("p.pid cannot be used: File too large: name another --pidfile", done.stderr)
        self.assertFalse((self.directory / "p.pid").exists())

    @inlineCallbacks
    def test_a_running_process(self) -> Any:
        """The pid file of a running process is refused with its pid; after a SIGKILL the file is taken over."""
        first = yield self.daemon()
        said = self.refused()
        self.assertIn(f"process {first.pid}, which runs: stop it", said)
        self.assertEqual(self.file.read_text(), f"{first.pid}\n")
        self.killed(first)
        second = yield self.daemon()
        self.assertNotEqual(second.pid, first.pid)

    @inlineCallbacks
    def test_named_in_the_foreground(self) -> Any:
        """A pid file that is named is written in the foreground too."""
        self.file.write_text("1")
        process = self.twistd("-n", "--logfile=log", f"--pidfile={self.file}")
        yield self.says("log", "server listens on")
        self.assertEqual(int(self.file.read_text()), process.pid)
        self.ends(process)
        self.assertFalse(self.file.exists())

    def test_refused(self) -> None:
        """A missing or unwritable place, or a file that is no pid file, is refused in one line with the option."""
        precious = self.directory / "precious"
        precious.write_text("not a pid")
        for argv, option in (
            (("--pidfile=/no/such/file",), "--pidfile"),
            ((f"--pidfile={precious}",), "--pidfile"),
            ((f"--pidfile={self.directory}",), "--pidfile"),
            (("-n", "--logfile=/no/such/file"), "--logfile"),
            (("--logfile=/no/such/file",), "--logfile"),
            (("-n", "--logfile=/dev/full"), "--logfile"),
            (("--logfile=/dev/full",), "--logfile"),
            (("-n", "--rundir=/no/such/directory"), "--rundir"),
            (("-n", "--chroot=/no/such/directory"), "--chroot"),
            (("-n", "--profile=/no/such/file"), "--profile"),
            (("-n", "--uid=4294967290"), "--uid"),
        ):
            with self.subTest(argv=argv):
                self.assertIn(f"name another {option}", self.refused(*argv))
        self.assertIn("s2s-server.log cannot be written", self.refused(cwd=Path("/proc")))
        self.assertEqual(precious.read_text(), "not a pid")
        self.assertFalse(self.file.exists())


class StreamTests(TwistdTestCase):
    """A role whose output or log cannot be written."""

    def test_help(self) -> None:
        """Help or a version that cannot be written causes one line and exit code 1, as does an unknown option."""
        read, write = os.pipe()
        os.close(read)
        with open("/dev/full", "w") as full, open(write, "w") as pipe:
            for stdout, why in ((full, "No space left on device"), (pipe, "Broken pipe")):
                for option, what in (
                    ("--help", f"the output cannot be written, {why}"),
                    ("--version", f"the output cannot be written, {why}"),
                    ("--nosuch", "option --nosuch not recognized: see twistd s2s-server --help"),
                ):
                    argv = [TWISTD, "s2s-server", option]
                    done = subprocess.run(argv, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
                    self.assertEqual((done.returncode, done.stderr), (1, f"twistd: {what}\n"))

    @inlineCallbacks
    def test_a_disk_that_fills_for_a_while(self) -> Any:
        """A role goes on while its log cannot be written, then logs the number of lost events; no event is torn."""
        log = yield self.filled("-n", "--logfile=log")
        self.assertEqual([line for line in log.splitlines()[1:] if not re.match("[0-9]{4}-", line)], [])

    @inlineCallbacks
    def test_a_stdout_that_fills_for_a_while(self) -> Any:
        """A role that logs to stdout goes on likewise; at most one line is torn, and the next one is whole."""
        with (self.directory / "log").open("a") as stdout:
            log = yield self.filled("-n", stdout=stdout)
        self.assertEqual(len([line for line in log.splitlines()[1:] if not re.match("[0-9]{4}-.* \\[", line)]), 1)

    @inlineCallbacks
    def filled(self, *argv: str, stdout: Any = subprocess.PIPE) -> Any:
        """Keep the disk full for a while, and return the whole log."""
        process = self.twistd(*argv, stdout=stdout)
        yield self.says("log", "server listens on")
        process.send_signal(signal.SIGHUP)
        yield self.says("log", "SIGHUP: ")
        log = self.directory / "log"
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        # The disk accepts a part of the first event that is lost.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size + 10, hard))
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
            with self.assertRaises(subprocess.TimeoutExpired):
                process.wait(0.3)
        self.assertEqual(log.read_text().count("SIGHUP"), 1)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        process.send_signal(signal.SIGHUP)
        yield self.says("log", "SIGHUP: ", 2)
        self.ends(process)
        told = r"\n\S+ \[s2s.runtime.log_file#error\] events lost before this line: [0-9]+: .*File too large"
        self.assertRegex(log.read_text(), told)
        return log.read_text()

    @inlineCallbacks
    def test_a_stdout_that_nobody_reads(self) -> Any:
        """A role whose log is a full pipe still handles signals, and ends in order on SIGTERM."""
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(read, False)
        said = b""

        def says(text: bytes) -> bool:
            nonlocal said
            with contextlib.suppress(BlockingIOError):
                said += os.read(read, 4096)
            return text in said

        with open(read), open(write, "wb", buffering=0) as pipe:
            process = self.twistd("-n", stdout=pipe)
            yield poll(lambda: says(b"server listens on"), "it runs", timeout=PATIENCE_S)
            pipe.write(b"\n")  # fills the only page of the pipe
            for _ in range(2):
                process.send_signal(signal.SIGHUP)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.5)
            says(b"")
            process.send_signal(signal.SIGHUP)
            yield poll(lambda: says(b"could not be written: nobody reads it"), "it tells", timeout=PATIENCE_S)
            self.assertRegex(said.decode(), "events lost before this line: [0-9]+: the log could not be written")
            pipe.write(b"\n")
            self.ends(process)

    def test_where_the_log_goes(self) -> None:
        """A full stdout, or one without a reader, is refused if the log goes there."""
        with open("/dev/full", "w") as full:
            self.assertIn("No space left on device: name another --logfile", self.refused("-n", stdout=full))
        read, write = os.pipe()
        os.close(read)
        with open(write, "w") as pipe:
            self.assertIn("Broken pipe: name another --logfile", self.refused("-n", stdout=pipe))

    def test_closed(self) -> None:
        """A closed stdout is refused in one line."""
        script = ["/bin/sh", "-c", 'exec "$0" -n s2s-server >&-', TWISTD]
        done = subprocess.run(script, cwd=self.directory, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("stdout is closed and the log goes there: open it, or name a --logfile", done.stderr)

    @inlineCallbacks
    def test_the_reader_leaves(self) -> Any:
        """A role goes on after the reader of its log has left, and ends in order with exit code 0."""
        process = self.twistd("-n")
        assert process.stdout is not None

        def listens() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if "server listens on" in line:
                    return

        yield deferToThread(listens)
        process.stdout.close()
        process.stdout = None
        process.send_signal(signal.SIGHUP)
        self.ends(process)


class DirectoryTests(TwistdTestCase):
    """The working directory of a role."""

    @inlineCallbacks
    def test_removed(self) -> Any:
        """A role with a database starts although its working directory was removed, as by a deployment."""
        gone = self.directory / "gone"
        gone.mkdir()
        argv = ["/bin/sh", "-c", 'rmdir "$PWD"; exec "$0" "$@"', TWISTD, "-n", f"--logfile={self.directory}/log"]
        server = ["s2s-server", "--listen", listen(free_port()), "--http", "off"]
        process = start_process(self, [*argv, *server], cwd=gone, **{DATABASE_VARIABLE: self.url})
        yield self.says("log", "server listens")
        self.ends(process)


class SignalTests(TwistdTestCase):
    """Signals besides SIGTERM and SIGINT."""

    @inlineCallbacks
    def test_hang_up(self) -> Any:
        """SIGHUP reopens a log that was moved away, any number of times, and the role goes on."""
        process = self.twistd("-n", "--logfile=log")
        yield self.says("log", "server listens on")
        for at in range(3):
            (self.directory / "log").rename(self.directory / f"moved.{at}")
            process.send_signal(signal.SIGHUP)
            yield self.says("log", "SIGHUP: the log was opened anew")
        self.ends(process)
        self.assertIn("Server Shut Down", (self.directory / "log").read_text())

    @inlineCallbacks
    def test_hang_up_without_a_directory(self) -> Any:
        """SIGHUP after the directory of the log was removed is reported on stderr and in the old log."""
        directory = self.directory / "logs"
        directory.mkdir()
        process = self.twistd("-n", "--logfile=logs/log")
        yield self.says("logs/log", "server listens on")
        with (directory / "log").open() as log:
            shutil.rmtree(directory)
            process.send_signal(signal.SIGHUP)
            assert process.stderr is not None
            said = yield deferToThread(process.stderr.readline)
            self.assertIn(f"the log {directory / 'log'} cannot be opened anew", said)
            self.ends(process)
            logged = log.read()
        self.assertIn("cannot be opened anew", logged)
        self.assertNotIn("was opened anew", logged)

    @inlineCallbacks
    def test_signals_of_others(self) -> Any:
        """SIGUSR1, SIGUSR2 and the signals of timers end no role, even if its log is no file."""
        for argv in (("-n", "--logfile=log"), ("-n",)):
            with open(self.directory / "stdout", "w") as stdout:
                process = self.twistd(*argv, stdout=stdout)
            yield self.says("log" if len(argv) > 1 else "stdout", "server listens on")
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGVTALRM, signal.SIGIO, signal.SIGALRM):
                process.send_signal(number)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.3)
            yield self.says("log" if len(argv) > 1 else "stdout", "SIGVTALRM came and has no effect: a handler that")
            self.ends(process)

    @inlineCallbacks
    def test_hang_up_at_any_time(self) -> Any:
        """SIGHUP and SIGQUIT do no harm while a role starts or stops."""
        process = self.twistd("-n", "--logfile=log")
        # The role handles both signals from the moment at which it has opened its log.
        yield poll((self.directory / "log").exists, "it starts", timeout=PATIENCE_S)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGQUIT)
        yield self.says("log", "SIGHUP: the log was opened anew")
        process.terminate()
        for _ in range(300):
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        self.assertEqual(process.returncode, 0)

    @inlineCallbacks
    def test_stacks(self) -> Any:
        """SIGQUIT writes the stacks of all threads to the log, each time, and the role goes on."""
        process = self.twistd("-n", "--logfile=log")
        yield self.says("log", "server listens on")
        times = 0
        # The first queries start the threads for the database.
        while times < 2 or "PoolThread-" not in (self.directory / "log").read_text():
            times += 1
            process.send_signal(signal.SIGQUIT)
            yield self.says("log", "MainThread (", times)
        self.ends(process)

    @inlineCallbacks
    def test_stacks_of_a_reactor_that_hangs(self) -> Any:
        """SIGQUIT shows where a reactor hangs, even in a regular expression, which lets no other thread run."""
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "stuck.py").write_text(_STUCK)
        stuck = self.server()
        stuck.launch_by([TWISTD], PYTHONPATH=str(self.directory))
        yield stuck.start()
        yield stuck.says("hangs from now on")
        os.kill(stuck.pid, signal.SIGQUIT)
        yield stuck.says("hang_for_hours")
        stuck.kill()

    @inlineCallbacks
    def test_a_thread_of_a_plug_in(self) -> Any:
        """A thread that a plug-in started and never ends delays the stop of a role by its grace at most."""
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "restless.py").write_text(
            "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
        )
        server = self.server()
        server.launch_by([TWISTD], PYTHONPATH=str(self.directory))
        yield server.start()
        server.terminate()
        yield deferToThread(server.assert_ended_well)

    def test_a_refused_start_with_a_plug_in(self) -> None:
        """Threads that a plug-in left behind do not keep a role alive whose start is refused."""
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            argv = [TWISTD, "-n", "s2s-server", "--http", "off", "--listen", listen(taken.getsockname()[1])]
            for text in (
                "import threading\nthreading.Thread(target=threading.Event().wait).start()\n",
                "import atexit, signal\natexit.register(signal.pause)\n",
            ):
                (plugins / "restless.py").write_text(text)
                variables = {DATABASE_VARIABLE: self.url, "PYTHONPATH": str(self.directory)}
                process = start_process(self, argv, cwd=self.directory, **variables)
                _, said = process.communicate(timeout=PATIENCE_S)
                self.assertEqual(process.returncode, 1, said)
                self.assertIn("choose another --listen", said)


class CertificateTests(RoleTestCase):
    """Certificates that are replaced while roles run."""

    def setUp(self) -> None:
        """Create an authority, and a server with one of its certificates."""
        super().setUp()
        self.tls = self.directory / "tls"
        make_certificates(self.tls, "a")
        self.port = free_port()

    def renew(self) -> None:
        """Replace the certificates."""
        certs.make(self.tls, ["localhost", "127.0.0.1"], ["a"], 1, datetime.now(timezone.utc), renew=True)

    @inlineCallbacks
    def shown(self) -> Any:
        """Return the certificate that the server sends."""
        pem = yield deferToThread(ssl.get_server_certificate, ("127.0.0.1", self.port))
        return pem.strip()

    def on_disk(self) -> str:
        """Return the server's certificate on disk."""
        return (self.tls / "server.pem").read_text().strip()

    @inlineCallbacks
    def served(self, endpoint: str) -> Any:
        """Check how a server handles new certificates, and broken ones."""
        server = self.server(endpoint=endpoint, port=self.port)
        yield server.start()
        first = self.on_disk()
        self.assertEqual((yield self.shown()), first)
        self.renew()
        self.assertEqual((yield self.shown()), first)
        os.kill(server.pid, signal.SIGHUP)
        second = self.on_disk()
        self.assertNotEqual(second, first)
        while (yield self.shown()) != second:
            self.assertTrue(server.is_running)
        (self.tls / "server.pem").write_text("broken")
        os.kill(server.pid, signal.SIGHUP)
        yield server.says("cannot be read")
        self.assertEqual((yield self.shown()), second)
        self.assertEqual(len(server.lines("those read before stay in force")), 1)

    @inlineCallbacks
    def test_server(self) -> Any:
        """On SIGHUP a server uses its new certificate; a broken one leaves the old one in force, with a line."""
        yield self.served(
            f"ssl:{self.port}:interface=127.0.0.1:privateKey={self.tls}/server.key:certKey={self.tls}/server.pem"
        )

    @inlineCallbacks
    def test_roots(self) -> Any:
        """An engine whose connection is refused because of its certificates reads them again, and links."""
        other = self.directory / "other"
        make_certificates(other, "a")
        server = self.server(endpoint=listen_tls(self.tls, self.port), port=self.port)
        yield server.start()
        engine = self.engine(connect_tls(other, "localhost", self.port))
        yield engine.start()
        yield engine.says("certificate verify failed")
        for name in ("engine-a.pem", "engine-a.key", "roots/ca.pem"):
            shutil.copy(self.tls / name, other / name)
        yield server.says(LINK_UP)
