"""A database, roles and a command line without the bundled world: ``--no-world``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from tests.support.http import ApiTestCase
from tests.support.roles import TWISTD, environment, free_port, listen
from tests.support.waiting import poll


class WithoutWorldTests(ApiTestCase):
    """Both roles and the console script without the world, on a database without its tables."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Remove the tables of the world, and start a server without it."""
        yield super().setUp()
        self.role.terminate()
        yield poll(lambda: not self.role.is_running, "the server ends")
        self.execute("drop schema s2s_world cascade; delete from s2s.migrations where schema = 's2s_world'")
        self.execute("delete from s2s.config where key like 'job.%%'")
        self.api, self.role = self.make_server("--no-world")
        yield self.role.start()

    @inlineCallbacks
    def test_the_roles(self) -> Iterator[Deferred[Any]]:
        """A linked server and engine have no job, no order, no setting and no report of the world."""
        engine = self.engine(self.role.port, "--no-world")
        yield engine.start()
        yield engine.says("link up")
        self.assertEqual(self.execute("select job_type from s2s.jobs"), [])
        path = "/v1/orders/world.set_sector_status.v1"
        self.refused(404, "not_found", "POST", path, {"sector_id": 1, "status": "neutral"})
        self.refused(404, "not_found", "GET", "/v1/world")
        catalogue = self.ask("GET", "/v1/catalogue").body["messages"]
        self.assertEqual({name for name in catalogue if not name.startswith("s2s.")}, {
            "admin.config.set.v1", "admin.engine.force_tick.v1",
        })  # fmt: skip
        order = self.ask("POST", "/v1/orders/admin.config.set.v1?wait=30", {"key": "relay.window", "value": 9})
        self.assertEqual((order.status, order.body["status"], order.body["way"]), (201, "done", "link"))
        tick = self.ask("POST", "/v1/orders/admin.engine.force_tick.v1?wait=30", {"job_type": "decay"})
        self.assertEqual((tick.body["status"], tick.body["result"]["code"]), ("refused", "not_found"))

    def test_the_console_script(self) -> None:
        """``s2s db migrate`` makes the tables of the world unless it is left out, by the option or the variable."""
        done = self.run_s2s("db", "migrate", "--no-world")
        self.assertEqual((done.returncode, done.stdout), (0, "the database is up to date\n"), done.stderr)
        self.assertEqual(self.run_s2s("db", "status", "--no-world").returncode, 0)
        self.assertEqual(self.run_s2s("db", "status", S2S_NO_WORLD="on").returncode, 0)
        for argv in (("db", "status"), ("order", "--help")):
            refused = self.run_s2s(*argv, S2S_NO_WORLD="maybe")
            self.assertIn("S2S_NO_WORLD is 'maybe': write 1 or 0, or leave it out", refused.stderr)
        self.assertEqual(self.run_s2s("db", "status").returncode, 1)
        commands = self.run_s2s("order", "--help", S2S_NO_WORLD="1").stdout
        self.assertIn("config-set", commands)
        self.assertNotIn("set-sector-status", commands)
        self.assertEqual(self.execute("select to_regnamespace('s2s_world')"), [(None,)])
        seeded = self.run_s2s("world", "seed", "--sectors", "3", "--ships", "5")
        for asked in (self.run_s2s("world", "show"), seeded):
            self.assertEqual((asked.returncode, asked.stderr.count("\n")), (1, 1))
            self.assertIn("lacks", asked.stderr)
            self.assertIn("run: s2s db migrate", asked.stderr)
        done = self.run_s2s("db", "migrate")
        self.assertEqual(done.stdout, "migrated: s2s_world/0001_initial\n", done.stderr)
        self.assertEqual(self.run_s2s("db", "status").returncode, 0)
        self.assertEqual(self.execute("select count(*) from s2s.config where key like 'job.%%'"), [(2,)])

    def test_a_role_that_wants_it(self) -> None:
        """A role with the world on a database without its tables is refused with the command that makes them."""
        refused = subprocess.run(
            [TWISTD, "-n", "--pidfile=", "s2s-engine"],
            env=environment(S2S_DATABASE_URL=self.url),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        self.assertEqual(refused.returncode, 1)
        self.assertIn("the database lacks s2s_world/0001_initial: run: s2s db migrate", refused.stderr)

    def test_up(self) -> None:
        """``s2s up`` without the world makes no world, and a broadcast comes the whole way."""
        listening = [listen(free_port()) for _ in range(2)]
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("s2s")),
                "up",
                "--no-world",
                "--for",
                "1",
                "--listen",
                listening[0],
                "--http",
                listening[1],
                "--state-dir",
                str(self.directory / "up"),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("migrated: s2s/0001_initial", done.stdout)
        self.assertNotIn("world", done.stdout.replace("--no-world", ""))
        self.assertNotIn("set-sector-status", done.stdout)
