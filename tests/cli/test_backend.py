"""Which way the command line goes, and what it says when a way is shut: :mod:`s2s.cli.backend`."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
from click.testing import CliRunner
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from s2s.cli.backend import Backend, HttpBackend, with_backend
from s2s.cli.up.supervisor import Api
from s2s.errors import OperatorError, Refused
from s2s.runtime import files
from s2s.store.access import make
from tests.support.http import ApiTestCase, shell
from tests.support.roles import free_port, start_process
from tests.support.waiting import poll

_MODULE = importlib.import_module("s2s.cli.backend")


class WayTests(SynchronousTestCase):
    """What is typed goes before the environment, and that before what is found."""

    def setUp(self) -> None:
        """Let each way say that it was taken."""
        self.state_dir = Path(self.mktemp())
        self.state_dir.mkdir()
        self.lock = (self.state_dir / "up.lock").open("ab")
        self.addCleanup(self.lock.close)

        @contextmanager
        def transaction(database: str | None, state_dir: Path) -> Iterator[str]:
            yield f"database {database} {state_dir.name}"

        class Http:
            """A door that does not open."""

            def __init__(self, api: Any) -> None:
                self.way = f"http {api.url} {api.token_file}"

            def close(self) -> None:
                """Nothing is open."""

            def __str__(self) -> str:
                return self.way

        self.patch(_MODULE, "transaction", transaction)
        self.patch(_MODULE, "HttpBackend", Http)
        self.patch(_MODULE, "DatabaseBackend", lambda way: way)

    def way(self, *argv: str, expected: int = 0, **variables: str) -> str:
        """Go, and say which way that was."""

        @click.command()
        @with_backend
        def go(backend: Backend) -> None:
            click.echo(str(backend))

        ours = {"S2S_URL": None, "S2S_TOKEN_FILE": None, "S2S_DATABASE_URL": None, "S2S_STATE_DIR": str(self.state_dir)}
        result = CliRunner(env={**ours, **variables}).invoke(go, list(argv))
        self.assertEqual(result.exit_code, expected, result.output)
        return result.output.strip()

    def running(self, **more: Any) -> None:
        """Let an ``s2s up`` run in the state directory."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        found = {"http": "http://up", "token_file": "up.token", "server_pid": os.getpid(), **more}
        (self.state_dir / "up.json").write_text(json.dumps(found))

    def test_the_order(self) -> None:
        """A URL or a database that is typed; then the environment's URL, then its database; then what runs here."""
        name = self.state_dir.name
        url, token = {"S2S_URL": "http://env", "S2S_TOKEN_FILE": "env.token"}, ("--token-file", "typed.token")
        database = {"S2S_DATABASE_URL": "postgresql://env"}
        self.running()
        self.assertEqual(self.way("--url", "http://typed", *token, **database), "http http://typed typed.token")
        self.assertEqual(self.way("--url", "http://typed", **url, **database), "http http://typed env.token")
        self.assertEqual(self.way("--database", "postgresql://typed", **url), f"database postgresql://typed {name}")
        self.assertEqual(self.way(**url, **database), "http http://env env.token")
        self.assertEqual(self.way(*token, **url), "http http://env typed.token")
        self.assertEqual(self.way(**database), f"database None {name}")
        self.assertEqual(self.way(), "http http://up up.token")
        (self.state_dir / "up.json").unlink()
        self.assertEqual(self.way(), f"database None {name}")

    def test_what_a_killed_one_left(self) -> None:
        """The file of an ``s2s up`` that does not run, or that says something else, is nothing that is found."""
        gone = Path("/proc/sys/kernel/pid_max").read_text()
        for left in ({"server_pid": int(gone) + 1}, {"server_pid": "x"}, {"token_file": 5}):
            self.running(**left)
            self.assertIn("database", self.way(), left)
        (self.state_dir / "up.json").write_text("{")
        self.assertIn("database", self.way())

    def test_a_pid_that_is_somebody_elses(self) -> None:
        """The file of a killed one leads nowhere, though the pid in it is another process's by now."""
        self.running()
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.assertIn("database", self.way())
        self.lock.close()
        (self.state_dir / "up.lock").unlink()
        self.assertIn("database", self.way())

    def test_two_ways(self) -> None:
        """Both typed, or a URL without a token, is one line that says what to name."""
        said = self.way("--url", "http://x", "--database", "postgresql://x", expected=1)
        self.assertEqual(said, "Error: --url and --database name two ways: name one of them")
        for variables, argv in (({"S2S_URL": "http://x"}, ()), ({}, ("--url", "http://x"))):
            said = self.way(*argv, expected=1, **variables)
            self.assertEqual(said, "Error: --url needs a token: name its file with --token-file or S2S_TOKEN_FILE")


class TokenTests(SynchronousTestCase):
    """A token that is replaced while a command follows an order."""

    def test_it_is_read_again(self) -> None:
        """A refused token is read again from its file, once for each that is new."""
        tried: list[str] = []

        class Client:
            def __init__(self, _: str, token: str) -> None:
                self.token = token

            def call(self, *_: Any, **__: Any) -> str:
                tried.append(self.token)
                if self.token != "good":
                    raise Refused("auth_bad", "the token is not valid", {})
                return "done"

            def close(self) -> None:
                pass

        self.patch(_MODULE, "AdminClient", Client)
        self.patch(_MODULE, "_running_reactor", lambda: None)
        self.patch(_MODULE, "blockingCallFromThread", lambda _, call: call())
        file = Path(self.mktemp())
        file.write_text("old")
        way = HttpBackend(Api("http://x", file))
        operation: Any = None
        self.assertRaises(OperatorError, way.call, operation)
        file.write_text("good")
        self.assertEqual(way.call(operation), "done")
        self.assertEqual(tried, ["old", "old", "good"])

    def test_a_pipe(self) -> None:
        """A pipe that nobody writes to is a line after a while."""
        self.patch(files, "SILENT_S", 0.1)
        pipe = Path(self.mktemp())
        os.mkfifo(pipe)
        refused = self.assertRaises(OperatorError, _MODULE._read_token, pipe)
        self.assertIn(f"{pipe} cannot be read, nothing came through it", str(refused))


class ShutTests(ApiTestCase):
    """A way that is shut is one line with the cure, and exit code 1."""

    def one_line(self, url: str, token_file: str, **more: str) -> str:
        """Go, and give the line."""
        [(code, stdout, stderr)] = shell([["config", "list"]], S2S_URL=url, S2S_TOKEN_FILE=token_file, **more)
        self.assertEqual((code, stdout, stderr.count("\n")), (1, "", 1), stderr)
        return stderr

    def test_mistakes(self) -> None:
        """No server, no URL, no token, and a token that is not valid."""
        nobody = f"http://127.0.0.1:{free_port()}"
        said = self.one_line(nobody, self.token_file())
        self.assertRegex(
            said, rf"^Error: {nobody} does not answer: .*refused.*: see --url and S2S_URL, or name --database"
        )
        self.assertIn("write http://HOST:PORT", self.one_line("here", self.token_file()))
        missing = str(self.directory / "missing")
        self.assertIn(f"the token file {missing} cannot be read, No such file", self.one_line(self.api, missing))
        wrong = self.directory / "wrong.token"
        wrong.write_text(make("an-admin"))
        said = self.one_line(self.api, str(wrong))
        self.assertRegex(said, "^Error: the token is not valid: .*: see --token-file and S2S_TOKEN_FILE\n$")
        self.assertNotIn("~", said)
        wrong.write_bytes(b"\xff")
        self.assertIn("it is no text", self.one_line(self.api, str(wrong)))

    def test_cursors(self) -> None:
        """Where a list cannot go on is said of the option."""
        for before in ("nope", "bad id!"):
            [(code, _, stderr)] = self.shell(["order", "list", "--before", before])
            self.assertEqual((code, stderr), (1, f"Error: --before {before}: take it from a list that is newer\n"))

    @inlineCallbacks
    def test_a_token_that_ends(self) -> Iterator[Deferred[Any]]:
        """A token that is revoked while an order is followed leaves it where it is, too."""
        following = deferToThread(self.shell, ["order", "force-tick", "decay", "--wait", "30"])
        yield poll(lambda: self.count("orders"), "it is given")
        self.execute("delete from s2s.api_tokens")
        [(code, _, stderr)] = yield following
        self.assertEqual(code, 3)
        self.assertRegex(stderr, r"the token is not valid.*: look later with: s2s order show ")

    @inlineCallbacks
    def test_an_order_whose_answer_is_lost(self) -> Iterator[Deferred[Any]]:
        """A server that dies while an order is followed leaves it where it is, and the command says where to look."""
        following = deferToThread(
            self.shell, ["order", "force-tick", "decay", "--wait", "30"], ["order", "force-tick", "decay"]
        )
        yield poll(lambda: self.count("orders"), "it is given")
        self.role.kill()
        [(code, stdout, stderr), (after, _, unreachable)] = yield following
        [(order_id,)] = self.execute("select order_id from s2s.orders")
        self.assertEqual((code, stdout), (3, ""))
        # On a busy machine it dies before it has said that it has the order.
        followed = f"the server was lost: .*: look later with: s2s order show {order_id}"
        self.assertRegex(stderr, f"^({followed}|.*the answer of http.* was lost: .*)\n$")
        self.assertEqual(after, 1)
        self.assertIn("does not answer", unreachable)


class FrozenTests(ApiTestCase):
    """A server that stands still."""

    @inlineCallbacks
    def test_ctrl_c(self) -> Iterator[Deferred[Any]]:
        """A command says what it waits for, and Ctrl-C ends it at once, also while it follows an order."""

        def start(*argv: str) -> subprocess.Popen[str]:
            way = {"S2S_URL": self.api, "S2S_TOKEN_FILE": self.token_file()}
            return start_process(self, [str(Path(sys.executable).with_name("s2s")), *argv], **way)

        follow = start("order", "force-tick", "decay", "--wait", "60")
        yield poll(lambda: self.count("orders"), "it is given")
        server = psutil.Process(self.role.pid)
        server.suspend()
        self.addCleanup(server.resume)
        for process, code in ((follow, 3), (start("order", "list"), 1)):
            said = yield deferToThread(process.stderr.readline)
            self.assertEqual(said, f"waiting for the answer of {self.api}\n")
            process.send_signal(signal.SIGINT)
            yield poll(lambda process=process: process.poll() is not None, "it ends")
            self.assertEqual(process.returncode, code)

    def test_the_clock(self) -> None:
        """A step of the wall clock changes no wait of a command."""
        look = "import time; from s2s.cli import backend; print(backend._running_reactor().seconds is time.monotonic)"
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "True\n")


class DeadlineTests(SynchronousTestCase):
    """The answer of an engine that shuts down."""

    def test_deadlines(self) -> None:
        """A deadline that is a time of day is shown as one, any other as the number that it is."""
        told = importlib.import_module("s2s.cli.engine")._told
        for deadline_ms, shown in ((1_700_000_000_000, "22:13:20 UTC"), (2**53 - 1, f"{2**53 - 1} ms of Unix time")):
            said = told({"state": "draining", "deadline_ms": deadline_ms})
            self.assertEqual(said, f"draining, its grace ends at {shown}")


class TlsTests(ApiTestCase):
    """Over TLS."""

    @inlineCallbacks
    def test_a_private_authority(self) -> Iterator[Deferred[Any]]:
        """The API is served over TLS; a client that trusts the authority of s2s certs comes in, another does not."""
        port, server, root = self.make_tls_server()
        yield server.start()
        way = {"S2S_URL": f"https://localhost:{port}", "S2S_TOKEN_FILE": self.token_file()}
        lines = [["config", "list", "--json"]]
        [(code, stdout, stderr)] = yield deferToThread(shell, lines, SSL_CERT_FILE=str(root), **way)
        self.assertEqual((code, stderr), (0, ""))
        self.assertIn("relay.window", stdout)
        [(code, _, stderr)] = yield deferToThread(shell, lines, **way)
        self.assertEqual(code, 1)
        self.assertRegex(
            stderr, r"^Error: https://localhost:\d+ does not answer: TLS failed: .*certificate verify failed"
        )
        self.assertEqual(stderr.count("\n"), 1)
