"""Orders from the command line to the database, and to an engine over the link or the table."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import click
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

from s2s.cli import main
from s2s.cli.common import interrupt_noted
from s2s.handlers.discovery import Found
from s2s.handlers.orders import OrderHandler, OrderRun
from s2s.handlers.run import Outcome
from s2s.store.driver import Cursor
from tests.cli.test_cli import CliTestCase
from tests.support.installed import FOUND, ORDERS
from tests.support.peer import CHECK, ERROR, Frame, ListeningPeer, Peer
from tests.support.roles import RoleTestCase, environment, free_port
from tests.support.waiting import poll

TICK, CONFIG = "admin.engine.force_tick.v1", "admin.config.set.v1"
SECTOR, SHIPS = "world.set_sector_status.v1", "admin.player.update_all_ships.v1"
PAUSE = "s2s.engine.pause"
WHY = ("--reason", "a test")

#: Each order: command line, RPC, params, result, an SQL expression of its effect, and the value of the expression.
GIVEN: tuple[tuple[tuple[str, ...], str, Frame, Any, str, Any], ...] = (
    (
        ("force-tick", "decay"),
        TICK,
        {"job_type": "decay"},
        {"decayed": 4, "bare": 0},
        "min(shields) from s2s_world.ships where sector_id <> 1",
        990,
    ),
    (
        ("config-set", "relay.window", "7"),
        CONFIG,
        {"key": "relay.window", "value": 7},
        {"key": "relay.window", "value": 7, "version": 1, "changed": True},
        "value from s2s.config where key = 'relay.window'",
        7,
    ),
    (
        ("set-sector-status", "3", "port_closed"),
        SECTOR,
        {"sector_id": 3, "status": "port_closed"},
        {"sector_id": 3, "status": "port_closed", "was": "neutral"},
        "status from s2s_world.sectors where sector_id = 3",
        "port_closed",
    ),
    (
        ("update-all-ships", "turns", "0", *WHY),
        SHIPS,
        {"update_field": "turns", "new_value": 0, "reason": "a test"},
        {"update_field": "turns", "new_value": 0, "ships": 6},
        "max(turns) from s2s_world.ships",
        0,
    ),
)
#: The number of row changes by table when each order runs once.
CHANGES = {"config": 1, "sectors": 1, "ships": 4 + 6}

#: Orders that an engine refuses: command line, code and message.
REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("force-tick", "no.such"), "not_found", "this engine has no job 'no.such': see s2s jobs list"),
    (("config-set", "no.such", "1"), "not_found", "there is no setting 'no.such': see s2s config list"),
    (("config-set", "relay.window", "0"), "bad_payload", "relay.window must be from 1 to 1024"),
    (("config-set", "relay.window", "-1"), "bad_payload", "relay.window must be from 1 to 1024"),
    (("config-set", "relay.window", "1025"), "bad_payload", "relay.window must be from 1 to 1024"),
    (("config-set", "relay.window", "true"), "bad_payload", "relay.window must be of type integer"),
    (("config-set", "relay.window", "many"), "bad_payload", "relay.window must be of type integer"),
    (("set-sector-status", "99", "neutral"), "not_found", "there is no sector 99"),
    (("update-all-ships", "turns", "-1", *WHY), "bad_payload", "turns must be from 0 to 1000000"),
    (("update-all-ships", "turns", "1000001", *WHY), "bad_payload", "turns must be from 0 to 1000000"),
    (("update-all-ships", "shields", "1000000001", *WHY), "bad_payload", "shields must be from 0 to 1000000000"),
)
#: Orders that their schema refuses, and the member at fault.
AT_THE_DOOR: tuple[tuple[tuple[str, ...], str], ...] = (
    (("force-tick", "No Such"), "job_type"),
    (("config-set", "", "1"), "key"),
    (("config-set", "relay.window", "9007199254740992"), "value"),
    (("set-sector-status", "3", "closed"), "status"),
    (("set-sector-status", "0", "neutral"), "sector_id"),
    (("set-sector-status", "true", "neutral"), "sector_id"),
    (("set-sector-status", "Sol", "neutral"), "sector_id"),
    (("update-all-ships", "player_id", "1", *WHY), "update_field"),
    (("update-all-ships", "turns", "true", *WHY), "new_value"),
    (("update-all-ships", "turns", "1.5", *WHY), "new_value"),
    (("update-all-ships", "turns", "1", "--reason", ""), "reason"),
)
#: The same orders as messages over the link.
RAW_REFUSED: tuple[tuple[str, Frame, str], ...] = (
    (TICK, {"job_type": "no.such"}, "not_found"),
    (CONFIG, {"key": "no.such", "value": 1}, "not_found"),
    (CONFIG, {"key": "relay.window", "value": 0}, "bad_payload"),
    (CONFIG, {"key": "relay.window", "value": 1025}, "bad_payload"),
    (CONFIG, {"key": "relay.window", "value": True}, "bad_payload"),
    (CONFIG, {"key": "relay.window", "value": "7"}, "bad_payload"),
    (SECTOR, {"sector_id": 99, "status": "neutral"}, "not_found"),
    (SHIPS, {"update_field": "turns", "new_value": -1, "reason": "x"}, "bad_payload"),
    (SHIPS, {"update_field": "turns", "new_value": 1_000_001, "reason": "x"}, "bad_payload"),
)
RAW_AT_THE_DOOR: tuple[tuple[str, Frame, str], ...] = (
    (TICK, {"job_type": "No Such"}, "job_type"),
    (CONFIG, {"key": "relay.window", "value": None}, "value"),
    (SECTOR, {"sector_id": 3, "status": "closed"}, "status"),
    (SECTOR, {"sector_id": True, "status": "neutral"}, "sector_id"),
    (SHIPS, {"update_field": "player_id", "new_value": 1, "reason": "x"}, "update_field"),
    (SHIPS, {"update_field": "turns", "new_value": True, "reason": "x"}, "new_value"),
    (SHIPS, {"update_field": "turns", "new_value": 1}, "reason"),
    (SHIPS, {"update_field": "turns", "new_value": 1, "reason": "x", "where": "1 = 1"}, "where"),
)


class WorldTestCase(RoleTestCase):
    """A small world, in which no job is due."""

    def setUp(self) -> None:
        """Create the world."""
        super().setUp()
        self.execute(
            "insert into s2s_world.sectors values (1, 'Sol', 'fedspace'), (2, 'Rim', 'neutral'), (3, 'Dock', 'neutral')"
        )
        self.execute("insert into s2s_world.ports values (1, 2, 'ore', 10, 100, 200, 50, 60, 1, 99)")
        self.execute(
            "insert into s2s_world.ships select n, n, 1 + n % 3, 10, 20, 1000, 40 from generate_series(1, 6) n"
        )
        for kind in FOUND.jobs.values():
            self.execute(
                "insert into s2s.jobs (job_type, schedule, due_at) values (%s, %s, now() + interval '1 day')",
                kind.job_type,
                kind.schedule,
            )
        # The scheduler's clock check would reduce, within a minute, a due time beyond the job's schedule.
        self.execute(
            "create function stay() returns trigger language plpgsql set search_path from current as"
            " 'begin new.due_at := greatest(new.due_at, old.due_at); return new; end';"
            "create trigger stay before update of due_at on s2s.jobs for each row execute function stay()"
        )

    def world(self) -> dict[str, list[Any]]:
        """Return all rows that an order may change."""
        tables = ("sectors", "ports", "ships", "config", "config_version", "config_history", "jobs", "outbox")
        return {name: self.execute(f"select * from {name} order by 1") for name in tables}

    def count_changes(self) -> None:
        """Count row changes from now on."""
        self.execute(
            "create table public.changes (what text);"
            "create function note() returns trigger language plpgsql set search_path from current as"
            " 'begin insert into public.changes values (tg_table_name); return null; end'"
        )
        for name in CHANGES:
            self.execute(f"create trigger note after update on {name} for each row execute function note()")

    def assert_done(self, *ways: str) -> None:
        """Assert that each of the four orders ran once, and came by one of these ways."""
        for (_, rpc, params, result, say, wanted), row in zip(GIVEN, self.json("order", "list")[::-1], strict=True):
            self.assertEqual((row["rpc"], row["params"], row["status"]), (rpc, params, "done"))
            self.assertEqual(row["result"], result)
            self.assertIn(row["way"], ways)
            self.assertEqual(row["engine"], "engine-1")
            self.assertEqual(self.execute(f"select {say}"), [(wanted,)])
            audit = self.execute(
                "select action, params, result ->> 'status', actor from s2s.audit where subject = %s order by audit_id",
                row["order_id"],
            )
            self.assertEqual(audit, [(rpc, params, None, row["actor"]), (rpc, params, "done", row["actor"])])
            self.assertRegex(row["actor"], "^cli:.")
        self.assertEqual(dict(self.execute("select what, count(*) from public.changes group by 1")), CHANGES)


class ShellTests(WorldTestCase, CliTestCase):
    """From the command line to real processes, and back."""

    @inlineCallbacks
    def test_over_the_link(self) -> Iterator[Deferred[Any]]:
        """Each of the four orders goes over the link, is done when the command ends, and is reported in one line."""
        yield self.linked()
        self.count_changes()
        for argv, *_ in GIVEN:
            self.assertRegex(self.s2s("order", *argv).output, r"^order [0-9A-Z]{26} is done: .+\n$")
        self.assert_done("link")

    @inlineCallbacks
    def linked(self) -> Iterator[Deferred[Any]]:
        """Start a server and an engine, and wait for the link."""
        server = self.server()
        self.role = self.engine(server.port)
        yield server.start()
        yield self.role.start()
        yield self.role.says("link up")
        yield poll(lambda: [row["state"] for row in self.json("engine", "list")] == ["running"], "it runs")

    @inlineCallbacks
    def test_from_the_table(self) -> Iterator[Deferred[Any]]:
        """Without a link the engine finds each order in the table, and refuses those that their schema refuses."""
        self.count_changes()
        yield self.engine(free_port()).start()
        told = [self.json("order", *argv) for argv, *_ in GIVEN]
        self.assertEqual([(row["status"], row["way"]) for row in told], [("done", "table")] * 4)
        self.assert_done("table")
        # Rows that were written by hand are validated like any other.
        before = self.world()
        for rpc, params, _ in RAW_AT_THE_DOOR:
            self.execute("insert into s2s.orders (rpc, params) values (%s, %s::jsonb)", rpc, json.dumps(params))
        refused = "select count(*) from s2s.orders where status = 'refused' and result ->> 'code' = 'bad_payload'"
        yield poll(lambda: self.execute(refused) == [(len(RAW_AT_THE_DOOR),)], "they are refused")
        self.assertEqual(self.world(), before)

    @inlineCallbacks
    def test_killed_in_between(self) -> Iterator[Deferred[Any]]:
        """Orders given while the engine hangs, which is then killed, run once each after its restart."""
        yield self.linked()
        self.count_changes()
        before = self.world()
        self.role.freeze()
        keys = [("--idem-key", f"key {argv[0]}") for argv, *_ in GIVEN]
        for key, (argv, *_) in zip(keys, GIVEN, strict=True):
            said = self.s2s("order", *argv, *key, "--wait", "0", expected=3).output
            self.assertRegex(said, r"^order (\w{26}) is queued, begun by no engine yet: see s2s order show \1\n$")
        ids = [row["order_id"] for row in self.json("order", "list", "--status", "queued")][::-1]
        self.role.kill()
        self.assertEqual(self.world(), before)
        yield self.role.start()
        # The same command with the same key follows the existing order to its end.
        self.assertEqual(
            [self.json("order", *argv, *key)["order_id"] for key, (argv, *_) in zip(keys, GIVEN, strict=True)],
            ids,
        )
        self.assert_done("link", "table")
        said = self.s2s("order", "force-tick", "port_refresh", *keys[0], expected=1).output
        self.assertEqual(
            said, f"Error: the --idem-key is that of another order: see it with: s2s order show {ids[0]}\n"
        )

    @inlineCallbacks
    def test_refused(self) -> Iterator[Deferred[Any]]:
        """A refused order changes nothing, is reported in one line, and is in the audit with its code."""
        yield self.linked()
        before = self.world()
        for argv, code, why in REFUSED:
            self.assert_refused(argv, code, why)
        self.s2s("engine", "pause")
        self.assert_refused(("force-tick", "decay"), "paused", "the engine is paused: resume it first")
        self.assertEqual(self.world(), before)
        self.assertEqual(len(self.json("order", "list", "--status", "refused")), len(REFUSED) + 1)
        # A paused engine runs all other orders.
        for argv, *_ in GIVEN[1:]:
            self.s2s("order", *argv)

    def assert_refused(self, argv: tuple[str, ...], code: str, why: str) -> None:
        """Assert that an engine refuses an order, and that its row, the audit and the command line have the reason."""
        result = self.s2s("order", *argv, "--json", expected=1)
        row = json.loads(result.stdout)
        self.assertEqual(result.stderr, f"Error: order {row['order_id']} is refused, {code}: {why}\n")
        self.assertEqual((row["status"], row["result"]["code"], row["result"]["message"]), ("refused", code, why))
        audit = self.execute(
            "select params, result from s2s.audit where subject = %s order by audit_id", row["order_id"]
        )
        self.assertEqual([params for params, _ in audit], [row["params"]] * 2)
        told = {"status": "refused", "result": row["result"], "engine": "engine-1", "way": "link"}
        self.assertEqual([said for _, said in audit], [None, told])


class RawTests(WorldTestCase):
    """The same orders from a server that is not ours."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Start an engine, and act as its server."""
        super().setUp()
        listening = ListeningPeer()
        self.addCleanup(listening.close)
        self.role = self.engine(listening.port)
        yield self.role.start()
        self.peer: Peer = listening.accept()
        self.addCleanup(self.peer.close)
        self.peer.greet()
        yield poll(lambda: self.peer.call(CHECK, {})["state"] == "running", "it runs")

    def answer(self, order_id: str, rpc: str, params: Frame) -> tuple[str, Frame]:
        """Send an order, and return the type and payload of its answer."""
        frame = self.peer.answer(self.peer.send(rpc, {"order_id": order_id, **params}))
        return frame["type"], frame["payload"]

    def test_refused(self) -> None:
        """An engine's refusal ends the order with a code; a schema's refusal is an error without an order."""
        before = self.world()
        for at, (rpc, params, code) in enumerate(RAW_REFUSED):
            self.assert_refused(f"raw-{at}", rpc, params, code)
        for rpc, params, member in RAW_AT_THE_DOOR:
            type, said = self.answer("door", rpc, params)
            self.assertEqual(
                (type, said["code"], said["details"]["path"]), (ERROR, "bad_payload", f"/payload/{member}")
            )
        self.peer.call(PAUSE, {"reason": "a test"})
        self.assert_refused("paused", TICK, {"job_type": "decay"}, "paused")
        self.assertEqual(self.world(), before)
        self.assertEqual(self.count("orders"), len(RAW_REFUSED) + 1)

    def assert_refused(self, order_id: str, rpc: str, params: Frame, code: str) -> None:
        """Assert that an order is refused, and that the audit has the refusal."""
        type, said = self.answer(order_id, rpc, params)
        self.assertEqual((type, said["ok"], said["order_id"], said["status"]), ("s2s.ack", False, order_id, "refused"))
        self.assertEqual(said["result"]["code"], code)
        audit = self.execute("select actor, action, result ->> 'status' from s2s.audit where subject = %s", order_id)
        self.assertEqual(audit, [("key:k1", rpc, None), ("key:k1", rpc, "refused")])
        # A repeated request gets the same answer, and the order does not run again.
        self.assertEqual(self.answer(order_id, rpc, params), (type, said))

    def test_the_same_again(self) -> None:
        """A repeated order gets the same answer; with other content it is a conflict that changes nothing."""
        one = {"key": "relay.window", "value": 1}
        done = self.answer("a", CONFIG, one)
        self.assertEqual((done[0], done[1]["ok"], done[1]["status"]), ("s2s.ack", True, "done"))
        self.assertEqual(done[1]["result"], {**one, "version": 1, "changed": True})
        before = self.world()
        self.assertEqual(self.answer("a", CONFIG, one), done)
        for rpc, params in (
            (CONFIG, {**one, "value": True}),  # equal to 1 in Python
            (CONFIG, {**one, "value": 2}),
            (SECTOR, {"sector_id": 3, "status": "fedspace"}),
        ):
            type, said = self.answer("a", rpc, params)
            self.assertEqual((type, said["code"], said["details"]["order_id"]), (ERROR, "idem_conflict", "a"))
        self.assertEqual(self.world(), before)
        self.assertEqual(self.count("orders"), 1)


class _Shell:
    """A fake ``time`` module for the command line, which runs a step at each sleep.

    :param steps: functions, one for each sleep.
    """

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)
        self._now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self._now

    def sleep(self, _: float) -> None:
        """Advance the clock by a second, and run the next step."""
        self._now += 1
        if self._steps:
            self._steps.pop(0)()


class FollowTests(CliTestCase):
    """Giving, following and listing orders, with SQL in place of the engine."""

    SECTOR = ("order", "set-sector-status", "3", "neutral")

    def follow(self, *steps: str | None, argv: tuple[str, ...] = SECTOR, expected: int) -> Any:
        """Give an order, and change its row at each sleep of the command."""

        def step(set_to: str | None) -> Callable[[], object]:
            return lambda: set_to and self.execute(f"update s2s.orders set {set_to}")

        shell = _Shell(*map(step, steps))
        for module in ("s2s.cli.order", "s2s.cli.backend"):
            self.patch(importlib.import_module(module), "time", shell)
        return self.s2s(*argv, expected=expected)

    def test_at_the_door(self) -> None:
        """An order that its schema refuses causes one line and an audit entry, and no order."""
        for argv, member in AT_THE_DOOR:
            result = self.s2s("order", *argv, expected=1)
            self.assertRegex(result.stderr, rf"^Error: refused, bad_payload: at /{member}: must satisfy .+\n$")
            self.assertEqual(result.stdout, "")
        self.assertEqual(self.execute("select count(*) from s2s.orders"), [(0,)])
        audit = self.execute("select actor, action, params, result from s2s.audit order by audit_id")
        self.assertEqual(len(audit), len(AT_THE_DOOR))
        for (argv, member), (actor, action, params, result) in zip(AT_THE_DOOR, audit, strict=True):
            self.assertRegex(actor, "^cli:.")
            self.assertIn(action, ORDERS)
            self.assertIn(str(params[member]).lower(), [word.lower() for word in argv])
            self.assertEqual((result["status"], result["result"]["code"]), ("refused", "bad_payload"))
            self.assertIn(f"at /body/{member}: ", result["result"]["message"])

    def test_values(self) -> None:
        """A value is parsed as the type of its setting, or else as a boolean, an integer or a string."""
        self.execute("insert into s2s.config (key, value, type) values ('a.text', '\"x\"', 'string')")
        for key, text, value in (
            ("a.text", "12", "12"),
            ("a.text", "true", "true"),
            ("relay.window", "12", 12),
            ("relay.window", "-12", -12),
            ("relay.window", "false", False),
            ("relay.window", "1.5", "1.5"),
            ("no.such", "12", 12),
            ("no.such", "true", True),
            ("no.such", "twelve", "twelve"),
        ):
            self.s2s("order", "config-set", key, text, "--wait", "0", expected=3)
            [(said, kind)] = self.execute(
                "select params -> 'value', jsonb_typeof(params -> 'value') from s2s.orders order by"
                " created_at desc limit 1"
            )
            self.assertEqual((said, type(said)), (value, type(value)), kind)

    def test_optional_params(self) -> None:
        """An optional param is an option that may be left out, and a param may have the name of another option."""

        class Ring(OrderHandler):
            rpc = "bell.ring.v1"
            schema: ClassVar = {
                "description": "Rings.",
                "type": "object",
                "properties": {
                    "url": {"type": "string"},
                    "is_loud": {"type": "boolean", "description": "Loud."},
                    "how_often": {"type": "integer"},
                },
                "required": ["url", "is_loud"],
            }

            def run(self, txn: Cursor, order: OrderRun) -> Outcome:
                return None

        self.patch(importlib.import_module("s2s.cli.order"), "installed", lambda _: Found(orders={Ring.rpc: Ring()}))
        self.assertIn("IS_LOUD: Loud. true | false", self.s2s("order", "bell-ring", "--help").output)
        self.s2s("order", "bell-ring", "x", "true", "--wait", "0", expected=3)
        self.s2s("order", "bell-ring", "x", "false", "--how-often", "3", "--wait", "0", expected=3)
        given = self.execute("select params from s2s.orders order by created_at")
        self.assertEqual(given, [({"url": "x", "is_loud": True},), ({"url": "x", "is_loud": False, "how_often": 3},)])

    def test_every_order_has_its_command(self) -> None:
        """Each order of the catalogue has a command, whose help explains the exit codes."""
        group: Any = main.commands["order"]
        told = [self.s2s("order", name, "--help").output for name in group.list_commands(click.Context(group))]
        for rpc in ORDERS:
            [page] = [page for page in told if f"({rpc})" in " ".join(page.split())]
            self.assertIn("3: it is not over", " ".join(page.split()))

    def test_nobody_takes_it(self) -> None:
        """Without progress within ``--wait`` the command reports the order's state and ends; the order stays."""
        result = self.follow(argv=(*self.SECTOR, "--wait", "5"), expected=3)
        self.assertRegex(result.stderr, r"^order (\w+) is queued, begun by no engine yet: see s2s order show \1\n$")
        result = self.follow(
            "status = 'running', state = '{\"done\": 2, \"total\": 9}'",
            argv=(*self.SECTOR, "--wait", "5", "--json"),
            expected=3,
        )
        self.assertRegex(result.stderr, r"^order (\w+) is running, 2 of 9: see s2s order show \1\n$")
        self.assertEqual(json.loads(result.stdout)["status"], "running")
        self.assertEqual(self.execute("select count(*) from s2s.orders where status = 'running'"), [(2,)])

    def test_as_long_as_it_moves(self) -> None:
        """The command waits as long as the order makes progress, without a limit on the total."""
        steps = [f"status = 'running', state = '{{\"done\": {at}}}'" for at in range(20)]
        argv = (*self.SECTOR, "--wait", "2")
        self.follow(None, *steps, None, "status = 'done'", argv=argv, expected=0)
        self.follow(None, *steps, None, None, "status = 'done'", argv=argv, expected=3)

    def test_the_end(self) -> None:
        """Success is reported on stdout, and failure in one escaped line on stderr."""
        done = self.follow('status = \'done\', result = \'{"ships": 6, "sector": "\\u001b[2J"}\'', expected=0)
        self.assertRegex(done.stdout, r'^order \w+ is done: ships 6, sector "\\u001b\[2J"\n$')
        self.assertEqual(done.stderr, "")
        said = '{"code": "internal_error", "message": "two\\nlines"}'
        failed = self.follow(f"status = 'failed', result = '{said}'", argv=(*self.SECTOR, "--json"), expected=1)
        self.assertRegex(failed.stderr, r"^Error: order \w+ is failed, internal_error: 'two\\nlines'\n$")
        row = json.loads(failed.stdout)
        self.assertEqual((row["status"], row["result"], row["progress"]), ("failed", json.loads(said), None))
        nothing = self.follow("status = 'done'", argv=(*self.SECTOR, "--idem-key", "k"), expected=0)
        self.assertRegex(nothing.stdout, r"^order \w+ is done: there is nothing to tell\n$")

    def test_the_database_goes_away(self) -> None:
        """If the database is lost during the wait the outcome is unknown, and the command names the order."""
        lose = "status = status where pg_terminate_backend((select pid from pg_stat_activity where datname ="
        result = self.follow(f"{lose} current_database() and application_name = 's2s cli'))", expected=3)
        [(order_id,)] = self.execute("select order_id from s2s.orders")
        self.assertRegex(result.stderr, rf"^the database was lost: .+: look later with: s2s order show {order_id}\n$")

    def test_looking(self) -> None:
        """Orders are shown with their progress, and listed newest first by status and RPC."""
        self.assertEqual(self.s2s("order", "list").output, "there are no orders\n")
        self.follow(argv=(*self.SECTOR, "--wait", "0", "--idem-key", "k"), expected=3)
        argv = ("order", "update-all-ships", "fuel", "1", *WHY, "--wait", "0")
        self.follow(argv=argv, expected=3)
        self.execute(
            "update s2s.orders set status = 'running', state = '{\"done\": 2, \"total\": 9}' where rpc = %s", SHIPS
        )
        rows = self.json("order", "list")
        self.assertEqual([(row["rpc"], row["progress"]) for row in rows], [(SHIPS, "2 of 9"), (SECTOR, None)])
        self.assertEqual(self.json("order", "list", "--limit", "1"), rows[:1])
        self.assertEqual(self.json("order", "list", "--status", "queued"), rows[1:])
        self.assertEqual(self.json("order", "list", "--rpc", SHIPS), rows[:1])
        self.assertEqual(self.json("order", "show", rows[1]["order_id"]), rows[1])
        self.assertEqual((rows[1]["idem_key"], rows[1]["params"]), ("k", {"sector_id": 3, "status": "neutral"}))
        self.assertIn("2 of 9", self.s2s("order", "show", rows[0]["order_id"]).output)
        said = self.s2s("order", "show", "nobody", expected=1).output
        self.assertEqual(said, "Error: there is no order 'nobody': see s2s order list\n")

    def test_mistyped(self) -> None:
        """An invalid key and an unknown option are refused, and no order is stored."""
        for key in ("", "\u00e9", "x" * 201):
            result = self.s2s(*self.SECTOR, "--idem-key", key, expected=1)
            self.assertRegex(result.stderr, r"^Error: --idem-key: must satisfy .+\n$")
        self.s2s(*self.SECTOR, "--wiat", "5", expected=2)
        self.assertEqual(self.execute("select count(*) from s2s.orders"), [(0,)])

    def test_on_a_terminal(self) -> None:
        """On a terminal a progress bar is shown; Ctrl-C leaves the order running, and it can be followed again."""
        argv = ("order", "update-all-ships", "fuel", "1", *WHY, "--idem-key", "k")
        self.execute("create table public.seen (n int)")
        with _Terminal(self.url, *argv) as terminal:
            terminal.until(lambda: self.execute("select count(*) from s2s.orders") == [(1,)])
            self.execute("update s2s.orders set status = 'running', state = '{\"done\": 30, \"total\": 100}'")
            terminal.until(lambda: "30/100" in terminal.shown)
            terminal.process.send_signal(signal.SIGINT)
            self.assertEqual(terminal.end()[0], 3)
        [(order_id,)] = self.execute("select order_id from s2s.orders where status = 'running'")
        self.assertIn(f"order {order_id} is running, 30 of 100: see s2s order show {order_id}", terminal.shown)
        self.assertNotIn("Traceback", terminal.shown)
        with _Terminal(self.url, *argv) as terminal:
            terminal.until(lambda: "30/100" in terminal.shown)
            self.execute("update s2s.orders set status = 'done', result = '{\"ships\": 100}'")
            self.assertEqual(terminal.end(), (0, f"order {order_id} is done: ships 100\n"))


class InterruptTests(SynchronousTestCase):
    """Ctrl-C while an order is followed."""

    def setUp(self) -> None:
        """Install Python's default handler of SIGINT."""
        super().setUp()
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))

    def test_where_an_exception_is_lost(self) -> None:
        """Ctrl-C is recorded even in a destructor, which loses exceptions; a second one ends the program."""

        class Unlucky:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGINT)

        with interrupt_noted() as is_interrupted:
            self.assertFalse(is_interrupted())
            Unlucky()
            self.assertTrue(is_interrupted())
            with self.assertRaises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)

    def test_where_it_means_something_else(self) -> None:
        """Ctrl-C stays ignored in a process that ignores it, such as a background job, and outside the main thread."""

        def note() -> bool:
            with interrupt_noted() as is_interrupted:
                return is_interrupted()

        with ThreadPoolExecutor(1) as threads:
            self.assertFalse(threads.submit(note).result())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupt_noted() as is_interrupted:
            signal.raise_signal(signal.SIGINT)
            self.assertFalse(is_interrupted())


class _Terminal:
    """A process of ``s2s`` whose stderr is a terminal.

    :ivar shown: the output to the terminal.
    """

    def __init__(self, url: str, *argv: str) -> None:
        self._ours, theirs = pty.openpty()
        os.set_blocking(self._ours, False)
        # Tests in the background ignore SIGINT, and the child process would inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("s2s")), *argv],
            env=environment(S2S_DATABASE_URL=url, TERM="xterm", COLUMNS="200"),
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._ours)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"it never comes: {self.shown!r}"
            self._read()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Wait for the end, and return the exit code and the content of stdout."""
        self.until(lambda: self.process.poll() is not None)
        self._read()
        assert self.process.stdout is not None
        return self.process.returncode, self.process.stdout.read()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # no output yet, or the end of the process
            self.shown += os.read(self._ours, 1 << 16).decode()
