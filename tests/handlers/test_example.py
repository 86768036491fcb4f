"""The complete plug-in in ``examples/harbour``, installed with pip, and the page that shows it."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

import s2s
from s2s.admin.client import AdminClient
from s2s.errors import Refused
from s2s.handlers import commands, jobs
from s2s.handlers.report import Report
from s2s.protocol.catalogue.schema import Schema
from s2s.store.pool import blocking
from tests.support.peer import PUSH, command
from tests.support.roles import TWISTD, RoleTestCase, environment, free_port, listen
from tests.support.waiting import poll

_EXAMPLE = Path(__file__).parents[2] / "examples" / "harbour"


class PageTests(SynchronousTestCase):
    """The page on plug-ins."""

    def test_it_shows_the_example_in_full(self) -> None:
        """docs/plugins.rst shows exactly the example that the other tests install, and each public name."""
        page = (_EXAMPLE.parent.parent / "docs" / "plugins.rst").read_text("utf-8")
        files = [path for path in _EXAMPLE.rglob("*.*") if path.suffix in (".py", ".sql", ".cfg", ".toml")]
        self.assertEqual(len(files), 5)
        for path in files:
            with self.subTest(path=path):
                self.assertTrue(indent(path.read_text("utf-8"), "    ") in page, path)
        self.assertEqual([name for name in s2s.__all__[1:] if f"``{name}``" not in page], [])


@cache
def _installed() -> str:
    """Install the example with pip, once for all tests, and return the directory."""
    directory = tempfile.mkdtemp(prefix="s2s-harbour-")
    atexit.register(shutil.rmtree, directory)
    # Install from a copy, since the build writes files beside the sources.
    sources = shutil.copytree(
        _EXAMPLE, Path(directory, "sources"), ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    target = str(Path(directory, "target"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", target, str(sources)],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return target


class ExampleTests(RoleTestCase):
    """``examples/harbour``, installed beside a broken plug-in."""

    def setUp(self) -> None:
        """Let the started processes find both plug-ins."""
        super().setUp()
        broken = self.directory / "s2s" / "plugins" / "broken.py"
        broken.parent.mkdir(parents=True)
        broken.write_text("raise RuntimeError('two\\nlines')")
        path = os.pathsep.join((_installed(), str(self.directory), os.environ.get("PYTHONPATH", "")))
        found = mock.patch.dict(os.environ, PYTHONPATH=path.rstrip(os.pathsep))
        found.start()
        self.addCleanup(found.stop)
        migrated = self.run_s2s("db", "migrate")
        # The broken plug-in is left out, which the exit code says.
        self.assertEqual(
            (migrated.returncode, migrated.stdout), (1, "migrated: harbour/0001_initial\n"), migrated.stderr
        )

    @inlineCallbacks
    def test_its_command(self) -> Iterator[Deferred[Any]]:
        """The server checks, accepts and runs the example's command, and logs one line about the broken plug-in."""
        server = self.server()
        yield server.start()
        peer = server.connect()
        self.addCleanup(peer.close)
        peer.greet()
        refused = peer.call(PUSH, command("sunk", {"ship_id": 7}, cmd_type="harbour.dock"))
        self.assertEqual((refused["code"], refused["details"]["path"]), ("bad_payload", "/payload/payload/berth"))
        acks = [
            peer.call(PUSH, command(f"dock {berth}", {"ship_id": 7, "berth": berth}, cmd_type="harbour.dock"))
            for berth in (1, 99)
        ]
        yield poll(
            lambda: self.execute("select array_agg(distinct status) from s2s.commands") == [(["done"],)],
            "both are done",
        )
        docked = self.execute("select cmd_id, ship_id, berth from harbour.docked order by cmd_id")
        self.assertEqual(docked, [(acks[0]["cmd_id"], 7, 1), (acks[1]["cmd_id"], 7, 99)])
        [line] = server.lines("plug-in")
        self.assertIn("plug-in s2s.plugins.broken is left out: RuntimeError: two lines: mend it", line)

    def test_its_job(self) -> None:
        """The example's job emits one notice for each of its due times, which the server's schema accepts."""
        with mock.patch.object(sys, "path", [_installed(), *sys.path]):
            tide = importlib.import_module("harbour").Tide()
        self.addCleanup(sys.modules.pop, "harbour")
        self.execute("insert into harbour.docked select n, n, n from generate_series(1, 3) n")
        with blocking(self.url) as txn:
            for due_at in (60, 120):
                run = jobs.JobRun(txn, f"harbour.tide:{due_at}", due_at, {"harbour.berths": 1}, 65536)
                self.assertEqual(tide.run(txn, run), {"left": 2 if due_at == 60 else 0})
        emitted = self.execute("select cmd_type, idem_key, payload from s2s.outbox order by outbox_id")
        self.assertEqual([row[1].rpartition(":")[0] for row in emitted], ["harbour.tide:60", "harbour.tide:120"])
        for cmd_type, _, payload in emitted:
            Schema(commands.registry(commands.BUILTIN)[cmd_type].schema).check(payload)

    @inlineCallbacks
    def test_its_job_is_scheduled(self) -> Iterator[Deferred[Any]]:
        """An engine that finds the example's job runs it when it is due, and a server publishes the notice."""
        server = self.server()
        engine = self.engine(server.port)
        yield server.start()
        yield engine.start()
        yield poll(lambda: self.count("jobs where job_type = 'harbour.tide'") == 1, "the job is in the table")
        self.execute("update s2s.jobs set due_at = to_timestamp(60) where job_type = 'harbour.tide'")
        # Wait for this run's own key, since the clock may meanwhile reach the next minute and its notice.
        key = f"harbour.tide:{self.database_id()}:60:%"
        notice = f"select message from s2s.notices join s2s.commands using (cmd_id) where idem_key like '{key}'"
        yield poll(lambda: self.execute(notice) == [("The tide turns, and 0 ships leave",)], "the notice")
        self.assertEqual(self.execute("select schedule from s2s.jobs where job_type ~ '^harbour'"), [("every:60s",)])

    @inlineCallbacks
    def test_its_order(self) -> Iterator[Deferred[Any]]:
        """The example's order, setting and report work over link, HTTP and command line, and the order is audited."""
        port = free_port()
        server = self.server(http=listen(port))
        engine = self.engine(server.port)
        yield server.start()
        yield engine.start()
        yield engine.says("link up")
        closed = self.run_s2s("order", "harbour-close", "closed", "--reason", "storm")
        self.assertEqual((closed.returncode, closed.stderr), (0, ""), closed.stdout)
        self.assertIn('is done: state "closed"', closed.stdout)
        again = self.run_s2s("order", "harbour-close", "closed", "--reason", "storm")
        self.assertIn("bad_payload: the harbour is closed already", again.stderr)
        self.assertIn(
            "Closes or opens the harbour. (harbour.close.v1)", self.run_s2s("order", "harbour-close", "-h").stdout
        )
        self.assertEqual(
            self.execute("select way, status from s2s.orders order by created_at"),
            [("link", "done"), ("link", "refused")],
        )
        audited = "select params ->> 'reason' from s2s.audit where action = 'harbour.close.v1'"
        self.assertEqual(self.execute(f"{audited} limit 1"), [("storm",)])
        token = json.loads(self.run_s2s("tokens", "add", "alice", "--role", "operator", "--json").stdout)["token"]
        api = AdminClient(f"http://127.0.0.1:{port}", token)
        self.addCleanup(api.close)
        order = yield api.give_order("harbour.close.v1", {"state": "open", "reason": "calm"}, wait_s=30)
        self.assertEqual((order.status, order.result), ("done", {"state": "open"}))
        refused = yield self.assertFailure(
            api.give_order("harbour.close.v1", {"state": "ajar", "reason": "x"}), Refused
        )
        self.assertEqual((refused.code, refused.details["path"]), ("bad_payload", "/body/state"))
        with mock.patch.object(sys, "path", [_installed(), *sys.path]):
            row = importlib.import_module("harbour").Docked
        self.addCleanup(sys.modules.pop, "harbour")
        found = yield api.show_report(Report("harbour.docked", "", row, ""))
        self.assertEqual(found, row("open", 0))
        self.assertEqual(self.run_s2s("config", "set", "harbour.berths", "0").returncode, 0)
        self.assertIn("must be", self.run_s2s("config", "set", "harbour.berths", "1001").stderr)

    def test_its_migration(self) -> None:
        """``s2s db migrate`` makes the example's tables; a role that lacks them is refused with that command."""
        self.assertEqual(self.execute("select name from s2s.migrations where schema = 'harbour'"), [("0001_initial",)])
        self.execute("drop schema harbour cascade; delete from s2s.migrations where schema = 'harbour'")
        server = subprocess.run(
            [TWISTD, "-n", "--pidfile=", "s2s-server", "--listen", listen(free_port()), "--http", "off"],
            env=environment(S2S_DATABASE_URL=self.url),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        self.assertEqual(server.returncode, 1)
        self.assertIn("the database lacks harbour/0001_initial: run: s2s db migrate", server.stderr)
        self.assertEqual(self.run_s2s("db", "status").returncode, 1)
        self.assertIn("migrated: harbour/0001_initial\n", self.run_s2s("db", "migrate").stdout)
        self.assertEqual(self.run_s2s("db", "status").returncode, 0)
        self.execute("insert into s2s.migrations (schema, version, name) values ('harbour', 2, '0002_later')")
        newer = self.run_s2s("db", "status")
        self.assertEqual(newer.returncode, 1)
        self.assertIn("harbour/0002_later", newer.stderr)
        self.assertIn("install a newer release of its plug-in", newer.stderr)

    def test_list(self) -> None:
        """``s2s plugins list`` shows all that the example brings, and the broken plug-in's complaint on stderr."""
        done = self.run_s2s("plugins", "list", "--json")
        rows = [tuple(row[name] for name in ("kind", "name", "source")) for row in json.loads(done.stdout)]
        self.assertEqual(
            [row for row in rows if "harbour" in row[2]],
            [
                ("command", "harbour.dock", "harbour"),
                ("job", "harbour.tide", "harbour"),
                ("order", "harbour.close.v1", "harbour"),
                ("report", "harbour.docked", "s2s.plugins.harbour_plugins"),
                ("setting", "harbour.berths", "s2s.plugins.harbour_plugins"),
                ("migrations", "harbour", "s2s.plugins.harbour_plugins"),
            ],
        )
        self.assertRegex(done.stderr, r"\Aplug-in s2s\.plugins\.broken is left out: [^\n]*\n\Z")
