"""Triggers of a database's owner that return null: a row that was to be written is not, and no error says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from s2s.errors import OperatorError, StatementRefused
from s2s.store.driver import KEPT, Cursor
from s2s.store.monitors import probe
from s2s.store.pool import blocking
from s2s.store.tables import broadcasts, claims, config, control_requests, notices, orders, outbox
from tests.support.postgres import DatabaseTestCase


class KeptRowsTests(DatabaseTestCase):
    """Each statement that writes a row notices that the row is not there."""

    def setUp(self) -> None:
        """Make the function of the triggers."""
        super().setUp()
        self.execute("create function keep() returns trigger language plpgsql as $$ begin return null; end $$")

    def refused(self, table: str, work: Callable[[Cursor], Any], when: str = "insert") -> None:
        """See that work fails where a table keeps its rows from being written."""
        self.execute(f"create trigger keep before {when} on {table} for each row execute function keep()")
        try:
            with blocking(self.url) as txn:
                self.assertIn(KEPT, str(self.assertRaises((StatementRefused, OperatorError), work, txn)))
        finally:
            self.execute(f"drop trigger keep on {table}")

    def test_each(self) -> None:
        """A row that is emitted, given, published, asked for, noted or set is told of where a trigger keeps it."""
        self.execute("insert into commands (cmd_type, idem_key, payload) values ('a.b', 'k', '{}')")
        self.execute("insert into broadcasts (message) values ('hello')")
        with blocking(self.url) as txn:
            config.declare(txn)
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
        self.refused("broadcasts", lambda txn: broadcasts.sweep(txn, 0, 10, 65536), "update")
        self.refused("config", lambda txn: config.change(txn, "executor.batch_size", 7, "cli:x"), "update")

    def test_a_broadcast(self) -> None:
        """A broadcast that cannot be changed holds up no other, and is told of where it is the last."""
        for message in ("first", "kept", "refused", "last"):
            self.execute("insert into broadcasts (message) values (%s)", message)
        self.execute(
            "create function guard() returns trigger language plpgsql as $$ begin"
            " if new.message = 'kept' then return null; end if;"
            " if new.message = 'refused' then raise exception 'not this one'; end if; return new; end $$;"
            "create trigger guard before update on broadcasts for each row execute function guard()"
        )
        with blocking(self.url) as txn:
            self.assertEqual(broadcasts.sweep(txn, 0, 10, 65536), 2)
        found = self.execute("select message from broadcasts where state = 'pending' order by broadcast_id")
        self.assertEqual(found, [("kept",), ("refused",)])
        self.assertEqual(self.execute("select payload ->> 'message' from outbox order by 1"), [("first",), ("last",)])
        with blocking(self.url) as txn:
            self.assertRaises(StatementRefused, broadcasts.sweep, txn, 0, 10, 65536)

    def test_the_probe(self) -> None:
        """The probe behind ``/readyz`` notices each of the rows that it writes."""
        for table, whens in {
            "idempotency_keys": ("insert",),
            "commands": ("insert", "update"),
            "batch_notes": ("insert", "update", "delete"),
        }.items():
            for when in whens:
                with self.subTest(table=table, when=when):
                    self.refused(table, probe.check, when)
