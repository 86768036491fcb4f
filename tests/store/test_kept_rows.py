"""Foreign triggers that return null: the row is not written, and PostgreSQL raises no error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from twisted.logger import capturedLogs, formatEvent

from s2s.errors import DatabaseUnavailable, OperatorError, StatementRefused
from s2s.protocol.settings import SETTINGS
from s2s.store import sqlstate
from s2s.store.driver import Cursor
from s2s.store.kept_rows import KEPT
from s2s.store.monitors import probe
from s2s.store.pool import blocking
from s2s.store.tables import (
    actions,
    audit,
    broadcasts,
    claims,
    command_types,
    commands,
    commands_admin,
    config,
    control_requests,
    engines,
    jobs,
    keys,
    notices,
    orders,
    outbox,
    outbox_admin,
    retention,
    rotation,
    tokens,
)
from s2s.store.tables.own_keys import database_id
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class KeptRowsTests(DatabaseTestCase):
    """Each statement that writes a row detects that a trigger kept the row from being written."""

    def setUp(self) -> None:
        """Make the function that the triggers call."""
        super().setUp()
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
            " return null; end $$"
        )

    def refused(self, table: str, work: Callable[[Cursor], Any], when: str = "insert") -> None:
        """Assert that work fails if a trigger keeps the rows of a table from being written."""
        self.execute(f"create trigger keep before {when} on {table} for each row execute function keep()")

        def attempt() -> Any:
            with blocking(self.url) as txn:
                return work(txn)

        try:
            self.assertIn(KEPT, str(self.assertRaises((StatementRefused, OperatorError), attempt)))
        finally:
            self.execute(f"drop trigger keep on {table}")

    def test_each(self) -> None:
        """A write to any of our tables raises an error if a trigger keeps its row from being written."""
        self.execute("insert into s2s.commands (cmd_type, idem_key, payload) values ('a.b', 'k', '{}')")
        self.execute("insert into s2s.broadcasts (message) values ('hello')")
        with blocking(self.url) as txn:
            config.declare(txn, SETTINGS)
        works: dict[str, list[Callable[[Cursor], Any]]] = {
            "outbox": [
                lambda txn: outbox.put(txn, "a.b", "k", {}),
                lambda txn: outbox.put_batch(txn, "a.b", [("k", {})]),
            ],
            "broadcasts": [lambda txn: broadcasts.add(txn, "hello")],
            "notices": [lambda txn: notices.insert_batch(txn, [(1, {"scope": "global", "message": "hello"})])],
            "orders": [lambda txn: orders.give(txn, "o", "admin.engine.force_tick.v1", {"job_type": "decay"}, "cli:x")],
            "steering": [lambda txn: control_requests.ask(txn, "engine-1", "s2s.engine.pause", {}, "cli:x")],
            "batch_notes": [lambda txn: claims.claim(txn, "boot", 0, 10)],
        }
        for table, each in works.items():
            for work in each:
                with self.subTest(table=table):
                    self.refused(table, work)
        self.execute("insert into s2s.outbox (cmd_type, idem_key, payload, state) values ('a.b', 'dead', '{}', 'dead')")
        self.execute("insert into s2s.commands (cmd_type, idem_key, payload, status) values ('a.b', 'd', '{}', 'dead')")
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', repeat('A', 43) || '=', 'any')")
        [(dead,)] = self.execute("select outbox_id from s2s.outbox")
        [(dead_command,)] = self.execute("select cmd_id from s2s.commands where status = 'dead'")
        with blocking(self.url) as txn:
            tokens.add(txn, "token", "observer")
            orders.give(txn, "given", "admin.engine.force_tick.v1", {"job_type": "decay"}, "cli:x")
            request_id = control_requests.ask(txn, "engine-1", "s2s.engine.pause", {}, "cli:x")
            claims.claim(txn, "boot-2", 0, 10)
        self.refused("outbox", lambda txn: actions.act(txn, outbox_admin.RETRY, [dead]), "update")
        self.refused("outbox", lambda txn: actions.act_on_dead(txn, outbox_admin.DISCARD, 0), "delete")
        self.refused(
            "commands", lambda txn: actions.act(txn, commands_admin.DISCARD, [dead_command], key_days=1), "delete"
        )
        self.refused("audit", lambda txn: audit.write(txn, "a", "b", {}))
        self.refused("api_tokens", lambda txn: tokens.add(txn, "x", "observer"))
        self.refused("api_tokens", lambda txn: tokens.revoke(txn, "token"), "delete")
        self.refused("s2s_keys", lambda txn: keys.add(txn, "x", "A" * 43 + "=", "any"))
        self.refused("s2s_keys", lambda txn: rotation.retire(txn, "k"), "update")
        self.refused("s2s_keys", lambda txn: rotation.revoke(txn, "k"), "update")
        self.refused("s2s_keys", lambda txn: rotation.activate(txn, "k"), "update")
        self.refused("engines", lambda txn: engines.want(txn, "engine-1", "paused", "why", "cli:x"))
        links = [engines.LinkRow("k", "engine-1", "boot-1", "here")]
        self.refused("engine_links", lambda txn: engines.show_links(txn, "boot-1", links))
        self.refused("jobs", lambda txn: jobs.declare(txn, "boot-1", {"tick": "every:5s"}, lambda _, now: now))
        self.refused("command_types", lambda txn: command_types.declare(txn, {"a.b": "{}"}))
        self.refused("steering", lambda txn: control_requests.take(txn, "boot-1", [("engine-1", "k1")]), "update")
        self.refused("steering", lambda txn: control_requests.answer(txn, request_id, True, {}), "update")
        self.refused("steering", lambda txn: control_requests.conclude(txn, [request_id]), "delete")
        self.refused("orders", lambda txn: orders.answered(txn, "given", "done", None, "engine-1", None), "update")
        self.refused("batch_notes", lambda txn: claims.release(txn, "boot-2", 0), "delete")
        self.refused("batch_notes", lambda txn: claims.release_all(txn, "boot-2"), "update")
        self.refused("batch_notes", lambda txn: claims.keep_stuck(txn, "boot-2", 0, [1]), "update")
        self.execute("truncate s2s.database; delete from s2s.config where key = 'commands.keep_days'")
        self.refused("database", database_id)
        self.refused("database", retention.advance)
        self.refused("config", lambda txn: config.declare(txn, SETTINGS))
        self.refused("broadcasts", lambda txn: broadcasts.sweep(txn, 0, 10, 65536), "update")
        self.refused("config", lambda txn: config.change(txn, "executor.batch_size", 7, "cli:x"), "update")

    def test_a_broadcast(self) -> None:
        """A broadcast that cannot be changed does not delay the others; a sweep of such broadcasts alone fails."""
        for message in ("first", "kept", "refused", "deferred", "last"):
            self.execute("insert into s2s.broadcasts (message) values (%s)", message)
        self.execute(
            "create function guard() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.message = 'kept' then return null; end if;"
            " if new.message = 'refused' then raise exception 'not this one'; end if; return new; end $$;"
            "create trigger guard before update on s2s.broadcasts for each row execute function guard();"
            "create function later() returns trigger language plpgsql set search_path from current as $$ begin"
            " raise exception 'not this one'; end $$;"
            "create constraint trigger later after update on s2s.broadcasts deferrable initially deferred"
            " for each row when (new.message = 'deferred') execute function later()"
        )
        with blocking(self.url) as txn:
            self.assertEqual(broadcasts.sweep(txn, 0, 10, 65536), 2)
        found = self.execute("select message from s2s.broadcasts where state = 'pending' order by broadcast_id")
        self.assertEqual(found, [("kept",), ("refused",), ("deferred",)])
        self.assertEqual(
            self.execute("select payload ->> 'message' from s2s.outbox order by 1"), [("first",), ("last",)]
        )
        with blocking(self.url) as txn:
            self.assertRaises(StatementRefused, broadcasts.sweep, txn, 0, 10, 65536)

    def test_a_part_is_kept(self) -> None:
        """An action changes the rows that it can, and reports each other row as kept."""
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload, state) values ('a.b', 'x', '{}', 'dead'),"
            " ('a.b', 'kept', '{}', 'dead');"
            "create trigger keep before delete on s2s.outbox for each row when (old.idem_key = 'kept')"
            " execute function keep()"
        )
        [(first,), (kept,)] = self.execute("select outbox_id from s2s.outbox order by 1")
        with self.assertRaisesRegex(StatementRefused, KEPT), blocking(self.url) as txn:
            outcomes = actions.act(txn, outbox_admin.DISCARD, [first, kept])
        self.assertEqual([each.outcome for each in outcomes], ["discarded", actions.KEPT])
        self.assertEqual(self.execute("select outbox_id from s2s.outbox"), [(kept,)])

    def test_the_old_row(self) -> None:
        """A row that a trigger leaves unchanged by returning the old row counts as kept."""
        self.execute(
            "create function old() returns trigger language plpgsql set search_path from current as $$ begin"
            " return old; end $$;"
            "insert into s2s.broadcasts (message) values ('hello');"
            "insert into s2s.outbox (cmd_type, idem_key, payload, state) values ('a.b', 'dead', '{}', 'dead'),"
            " ('a.b', 'waiting', '{}', 'waiting');"
            "insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:5s', '2021-01-01')"
        )
        [(dead,), (waiting,)] = self.execute("select outbox_id from s2s.outbox order by 1")
        with blocking(self.url) as txn:
            job = jobs.attempt(txn, ["tick"])
            assert job is not None
        for table in ("broadcasts", "outbox", "jobs"):
            self.execute(f"create trigger old before update on s2s.{table} for each row execute function old()")

        def refused(work: Callable[[Cursor], Any]) -> None:
            with blocking(self.url) as txn:
                self.assertIn(KEPT, str(self.assertRaises(StatementRefused, work, txn)))

        refused(lambda txn: broadcasts.sweep(txn, 0, 10, 65536))
        refused(lambda txn: actions.act(txn, outbox_admin.RETRY, [dead]))
        refused(lambda txn: actions.act(txn, outbox_admin.CANCEL, [waiting]))
        refused(lambda txn: jobs.finish(txn, job, lambda _, now: now, None))
        refused(lambda txn: jobs.go_on(txn, job, job.place, {}, True))
        refused(lambda txn: jobs.go_on(txn, job, job.place, {}, False))
        works: dict[str, Callable[[Cursor], Any]] = {
            "claim": lambda txn: outbox.Claims().claim(txn, 10, 5.0),
            "lease": lambda txn: outbox.lease(txn, [waiting], 5.0),
            "give back": lambda txn: outbox.lease(txn, [waiting], 0.0),
            "retry": lambda txn: outbox.retry(txn, [(waiting, 1.0, "overloaded", "m")]),
            "kill": lambda txn: outbox.kill(txn, [(waiting, "teapot", "m")]),
        }
        for name, work in works.items():
            with self.subTest(name), self.assertRaisesRegex(StatementRefused, KEPT), blocking(self.url) as txn:
                self.assertEqual(work(txn), [] if name == "claim" else [waiting])
        self.execute("drop trigger old on s2s.jobs; update s2s.jobs set retry_at = null")
        self.execute("create trigger old before update on s2s.jobs for each row execute function old()")
        refused(lambda txn: jobs.attempt(txn, ["tick"]))

    def test_retention(self) -> None:
        """A retention step whose rows are kept raises an error at its end, and reports 0 removed rows."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, status, created_at, finished_at) select"
            " 'a.b', n, '{}',"
            " 'done', '2021-01-01', '2021-01-01' from generate_series(1, 3) n;"
            "insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id, expires_at) select 'e' || n,"
            " sha256('x'), n,"
            " '2021-01-01' from generate_series(1, 1000) n;"
            "insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id) select idem_key, sha256('x'), cmd_id"
            " from s2s.commands;"
            "insert into s2s.steering (engine, type, payload, actor, created_at, expires_at) values"
            " ('engine-1', 's2s.engine.pause', '{}', 'x', '2021-01-01', '2021-01-01')"
        )
        keep = retention.Keep(1, 1, 1)
        works: dict[str, Callable[[Cursor], Any]] = {
            "commands": lambda txn: retention.sweep_commands(txn, 0, keep),
            "idempotency_keys": retention.sweep_keys,
            "steering": retention.sweep_steering,
        }
        for table, work in works.items():
            with self.subTest(table=table):
                self.refused(table, work, "delete")
                self.execute(f"create trigger keep before delete on {table} for each row execute function keep()")
                with contextlib.suppress(StatementRefused), blocking(self.url) as txn:
                    self.assertEqual(work(txn)[0], 0)
                self.execute(f"drop trigger keep on {table}")
        # The sweep of commands sets the expiry of their idempotency keys.
        self.refused("idempotency_keys", works["commands"], "update")

    def test_the_cause(self) -> None:
        """The error names the table, the operation and the trigger, with the statement that removes the trigger."""
        self.execute('create trigger "Keep it" before insert on s2s.outbox for each row execute function keep()')
        with blocking(self.url) as txn:
            refused = self.assertRaises(StatementRefused, outbox.put, txn, "a.b", "k", {})
        self.assertIn(
            '(insert on s2s.outbox): trigger "Keep it" on s2s.outbox (insert, function public.keep())', str(refused)
        )
        self.assertIn('drop trigger "Keep it" on s2s.outbox: a trigger has to return', sqlstate.with_cure(refused))

    async def test_the_pool(self) -> None:
        """The pool logs kept rows once for each table, remembers them, and commits work that continues."""
        database, handlers = self.pools("s2s-kept")
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) values ('a.b', 'x', '{}');"
            "create trigger keep before delete on s2s.outbox for each row execute function keep()"
        )
        [(kept,)] = self.execute("select outbox_id from s2s.outbox")
        with capturedLogs() as told:
            for pool in (database, handlers):
                self.assertEqual(await pool.run(outbox.delete, [kept]), [kept])
            with self.assertRaises(StatementRefused):
                self.execute("create trigger keep before insert on s2s.notices for each row execute function keep()")
                await database.run(notices.insert_batch, [(1, {"scope": "global", "message": "hello"})])
            await poll(lambda: "notices" in database.kept, "the second line")
        lines = [str(formatEvent(event)) for event in told]
        self.assertEqual(len(lines), 2, lines)
        self.assertIn("(delete on s2s.outbox): trigger keep on s2s.outbox", lines[0])
        self.assertIn("(insert on s2s.notices): trigger keep on s2s.notices", lines[1])
        self.assertIn("delete on s2s.outbox", database.kept)

    async def test_a_rule(self) -> None:
        """A rule that breaks our statement is logged once with its table, and the database counts as available."""
        database, _ = self.pools("s2s-kept")
        self.execute(
            "create table public.spied (n int); create rule spy as on insert to s2s.commands do also insert into"
            " spied values (1)"
        )
        with capturedLogs() as told:
            for _ in range(3):
                with self.assertRaises(DatabaseUnavailable):
                    await database.run_steps(
                        commands.push_batch, [commands.Push("a.b", "k", b"x" * 32, "{}", 100, None)]
                    )
            await poll(lambda: database.kept, "the line")
        [line] = [str(formatEvent(event)) for event in told]
        self.assertIn("rule spy on s2s.commands (insert): drop rule spy on s2s.commands", line)
        self.assertNotIn("not available", line)
        self.assertFalse(database.is_away)

    def test_the_probe(self) -> None:
        """The probe of ``/readyz`` detects kept rows for each of its writes."""
        for table, whens in {
            "idempotency_keys": ("insert",),
            "commands": ("insert", "update"),
            "batch_notes": ("insert", "update", "delete"),
        }.items():
            for when in whens:
                with self.subTest(table=table, when=when):
                    self.refused(table, probe.check, when)
