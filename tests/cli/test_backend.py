"""The backend that the command line uses, and the errors if it cannot be reached: :mod:`s2s.cli.backend`."""

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
    """Options take precedence over the environment, and the environment over a running ``s2s up``."""

    def setUp(self) -> None:
        """Replace each backend by one that records its choice."""
        self.state_dir = Path(self.mktemp())
        self.state_dir.mkdir()
        self.lock = (self.state_dir / "up.lock").open("ab")
        self.addCleanup(self.lock.close)

        @contextmanager
        def transaction(database: str | None, state_dir: Path) -> Iterator[str]:
            yield f"database {database} {state_dir.name}"

        class Http:
            """An HTTP backend that does not connect."""

            def __init__(self, api: Any) -> None:
                self.way = f"http {api.url} {api.token_file}"

            def close(self) -> None:
                """Do nothing."""

            def __str__(self) -> str:
                return self.way

        self.patch(_MODULE, "transaction", transaction)
        self.patch(_MODULE, "HttpBackend", Http)
        self.patch(_MODULE, "DatabaseBackend", lambda way: way)

    def way(self, *argv: str, expected: int = 0, **variables: str) -> str:
        """Run a command, and return the backend that it got."""

        @click.command()
        @with_backend
        def go(backend: Backend) -> None:
            click.echo(str(backend))

        ours = {"S2S_URL": None, "S2S_TOKEN_FILE": None, "S2S_DATABASE_URL": None, "S2S_STATE_DIR": str(self.state_dir)}
        result = CliRunner(env={**ours, **variables}).invoke(go, list(argv))
        self.assertEqual(result.exit_code, expected, result.output)
        return result.output.strip()

    def running(self, **more: Any) -> None:
        """Simulate a running ``s2s up`` in the state directory."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        found = {"http": "http://up", "token_file": "up.token", "server_pid": os.getpid(), **more}
        (self.state_dir / "up.json").write_text(json.dumps(found))

    def test_the_order(self) -> None:
        """The order is: an option, the environment's URL, its database, a running ``s2s up``, the state directory."""
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
        """The file of an ``s2s up`` that does not run, or a malformed file, is ignored."""
        gone = Path("/proc/sys/kernel/pid_max").read_text()
        for left in ({"server_pid": int(gone) + 1}, {"server_pid": "x"}, {"token_file": 5}):
            self.running(**left)
            self.assertIn("database", self.way(), left)
        (self.state_dir / "up.json").write_text("{")
        self.assertIn("database", self.way())

    def test_a_pid_that_is_somebody_elses(self) -> None:
        """The file of a killed ``s2s up`` is ignored, even if another process has its pid now."""
        self.running()
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.assertIn("database", self.way())
        self.lock.close()
        (self.state_dir / "up.lock").unlink()
        self.assertIn("database", self.way())

    def test_two_ways(self) -> None:
        """Two backends, or a URL without a token, are refused in one line that names the options."""
        said = self.way("--url", "http://x", "--database", "postgresql://x", expected=1)
        self.assertEqual(said, "Error: --url and --database name two ways: name one of them")
        for variables, argv in (({"S2S_URL": "http://x"}, ()), ({}, ("--url", "http://x"))):
            said = self.way(*argv, expected=1, **variables)
            self.assertEqual(said, "Error: --url needs a token: name its file with --token-file or S2S_TOKEN_FILE")


class TokenTests(SynchronousTestCase):
    """A token that is replaced while a command follows an order."""

    def test_it_is_read_again(self) -> None:
        """After a refusal the token file is read again, and a new token is tried once."""
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
        """A pipe that nobody writes to is refused after a timeout."""
        self.patch(files, "SILENT_S", 0.1)
        pipe = Path(self.mktemp())
        os.mkfifo(pipe)
        refused = self.assertRaises(OperatorError, _MODULE._read_token, pipe)
        self.assertIn(f"cannot be read: {pipe}: nothing came through it", str(refused))


class ShutTests(ApiTestCase):
    """A backend that cannot be reached causes one line with the cure, and exit code 1."""

    def one_line(self, url: str, token_file: str, **more: str) -> str:
        """Run ``s2s config list``, and return its error line."""
        [(code, stdout, stderr)] = shell([["config", "list"]], S2S_URL=url, S2S_TOKEN_FILE=token_file, **more)
        self.assertEqual((code, stdout, stderr.count("\n")), (1, "", 1), stderr)
        return stderr

    def test_mistakes(self) -> None:
        """A missing server, an invalid URL, a missing or binary token file and a wrong token are reported."""
        nobody = f"http://127.0.0.1:{free_port()}"
        said = self.one_line(nobody, self.token_file())
        self.assertRegex(
            said, rf"^Error: {nobody} does not answer: .*refused.*: see --url and S2S_URL, or name --database"
        )
        self.assertIn("write http://HOST:PORT", self.one_line("here", self.token_file()))
        missing = str(self.directory / "missing")
        self.assertIn(f"the token file cannot be read: {missing}: No such file", self.one_line(self.api, missing))
        wrong = self.directory / "wrong.token"
        wrong.write_text(make("an-admin"))
        said = self.one_line(self.api, str(wrong))
        self.assertRegex(said, "^Error: the token is not valid: .*: see --token-file and S2S_TOKEN_FILE\n$")
        self.assertNotIn("~", said)
        for content, why in (
            (b"\xff", "it is not UTF-8 text: see --token-file"),
            (b"s2s_one\ns2s_two\n", "it has more than one line: see --token-file"),
            (b"\n", "the token file has no token"),
            ("t\u00f6ken".encode(), "the token file has no token"),
        ):
            wrong.write_bytes(content)
            self.assertIn(why, self.one_line(self.api, str(wrong)))

    def test_a_token_of_windows(self) -> None:
        """A token file that an editor on Windows has written, with a byte order mark or in UTF-16, is read."""
        given = Path(self.token_file()).read_text().strip()
        file = self.directory / "windows.token"
        for content in (b"\xef\xbb\xbf" + given.encode() + b"\r\n", f"{given}\r\n".encode("utf-16")):
            file.write_bytes(content)
            [(code, _, stderr)] = shell([["config", "list"]], S2S_URL=self.api, S2S_TOKEN_FILE=str(file))
            self.assertEqual((code, stderr), (0, ""))

    def test_cursors(self) -> None:
        """An error of the cursor names the option ``--before``."""
        for before in ("nope", "bad id!"):
            [(code, _, stderr)] = self.shell(["order", "list", "--before", before])
            self.assertEqual((code, stderr), (1, f"Error: --before {before}: take it from a list that is newer\n"))

    @inlineCallbacks
    def test_a_token_that_ends(self) -> Iterator[Deferred[Any]]:
        """If the token is revoked while an order is followed, the command names the order and exits with 3."""
        following = deferToThread(self.shell, ["order", "force-tick", "decay", "--wait", "30"])
        yield poll(lambda: self.count("orders"), "it is given")
        self.execute("delete from s2s.api_tokens")
        [(code, _, stderr)] = yield following
        self.assertEqual(code, 3)
        self.assertRegex(stderr, r"the token is not valid.*: look later with: s2s order show ")

    @inlineCallbacks
    def test_an_order_whose_answer_is_lost(self) -> Iterator[Deferred[Any]]:
        """If the server dies while an order is followed, the command names the order and exits with 3."""
        following = deferToThread(
            self.shell, ["order", "force-tick", "decay", "--wait", "30"], ["order", "force-tick", "decay"]
        )
        yield poll(lambda: self.count("orders"), "it is given")
        self.role.kill()
        [(code, stdout, stderr), (after, _, unreachable)] = yield following
        [(order_id,)] = self.execute("select order_id from s2s.orders")
        self.assertEqual((code, stdout), (3, ""))
        # On a busy machine the server may die before it has confirmed the order.
        followed = f"the server was lost: .*: look later with: s2s order show {order_id}"
        self.assertRegex(stderr, f"^({followed}|.*the answer of http.* was lost: .*)\n$")
        self.assertEqual(after, 1)
        self.assertIn("does not answer", unreachable)


class FrozenTests(ApiTestCase):
    """A server process that is stopped by a signal."""

    @inlineCallbacks
    def test_ctrl_c(self) -> Iterator[Deferred[Any]]:
        """A waiting command reports its wait, and Ctrl-C ends it at once, also while it follows an order."""

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
        """The command line measures waits with the monotonic clock."""
        look = "import time; from s2s.cli import backend; print(backend._running_reactor().seconds is time.monotonic)"
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "True\n")


class DeadlineTests(SynchronousTestCase):
    """The reply of an engine that shuts down."""

    def test_deadlines(self) -> None:
        """A deadline is shown as a time of day, or as a number if it is out of range."""
        told = importlib.import_module("s2s.cli.engine")._told
        for deadline_ms, shown in ((1_700_000_000_000, "22:13:20 UTC"), (2**53 - 1, f"{2**53 - 1} ms of Unix time")):
            said = told({"state": "draining", "deadline_ms": deadline_ms})
            self.assertEqual(said, f"draining, its grace ends at {shown}")


class TlsTests(ApiTestCase):
    """The API over TLS."""

    @inlineCallbacks
    def test_a_private_authority(self) -> Iterator[Deferred[Any]]:
        """A client that trusts the authority of ``s2s certs`` connects over TLS, and another client is refused."""
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
