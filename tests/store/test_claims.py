"""Concurrent claims: attempts of jobs and orders, and batches of commands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg2
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from s2s.handlers.orders.force_tick import ForceTick
from s2s.store import driver
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.store.tables import claims, jobs, orders
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_GATE = 77
#: A session named "late" waits for the lock in the middle of its statement: after its snapshot, before it searches.
_TRIGGER = """
create function wait_at_gate() returns trigger language plpgsql set search_path from current as $$ begin
    if current_setting('application_name') = 'late' then perform pg_advisory_xact_lock_shared({gate}); end if;
    return null;
end $$;
create trigger a_gate before update on {table} for each statement execute function wait_at_gate()
"""


class AttemptTests(DatabaseTestCase):
    """Two sessions search for work at the same time."""

    async def check(self, table: str, attempt: Callable[[Cursor], Any], hold: Callable[[Cursor, Any], bool]) -> None:
        """Assert that one session counts an attempt, and can hold its work while the other session still searches."""
        self.execute(_TRIGGER.format(table=table, gate=_GATE))
        gate = psycopg2.connect(self.url)
        self.addCleanup(gate.close)
        gate.cursor().execute("select pg_advisory_xact_lock(%s)", (_GATE,))
        found: dict[str, Any] = {}
        may_end = threading.Event()
        self.addCleanup(may_end.set)

        def look(name: str) -> None:
            with blocking(self.url, name) as txn:
                found[name] = attempt(txn)
                if name == "late":
                    may_end.wait(20)

        def state(name: str) -> str | None:
            rows = self.execute(
                "select coalesce(wait_event_type, '') from pg_stat_activity where application_name = %s", name
            )
            return rows[0][0] if rows else None

        late: Deferred[None] = deferToThread(look, "late")
        await poll(lambda: state("late") == "Lock", "the late one at the gate")
        quick: Deferred[None] = deferToThread(look, "quick")
        await poll(lambda: state("quick") == "Lock" or quick.called, "the quick one")
        gate.rollback()
        await poll(lambda: "late" in found, "what the late one has found")
        if not quick.called:
            # The quick session waits until the late one ends.
            may_end.set()
            await late
            await quick
        [due] = [each for each in found.values() if each is not None]
        with blocking(self.url, "hold") as txn:
            self.assertTrue(hold(txn, due))
        may_end.set()
        await late
        await quick

    async def test_a_job(self) -> None:
        """Of two concurrent searches for a job, one finds the job and can hold it."""
        self.execute("insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:60s', to_timestamp(0))")
        await self.check("jobs", lambda txn: jobs.attempt(txn, ["tick"]), jobs.hold)

    async def test_an_order(self) -> None:
        """Of two concurrent searches for an order, one finds the order and can hold it."""
        rpc = ForceTick.rpc
        with blocking(self.url, "give") as txn:
            orders.give(txn, "o", rpc, {"job_type": "tick"}, "somebody", by_link=True)
        await self.check("orders", lambda txn: orders.attempt(txn, [rpc], [], [], 0.0, {}), orders.hold)


class FrozenTests(DatabaseTestCase):
    """A session that freezes during its search for work blocks other sessions for FROZEN_S at most."""

    def check(self, attempt: Callable[[Cursor], Any]) -> None:
        """Assert that another session finds the work that the frozen session had found."""
        self.patch(driver, "FROZEN_S", 0.2)
        frozen = psycopg2.connect(self.url)
        self.addCleanup(frozen.close)
        self.assertTrue(attempt(frozen.cursor()))
        with blocking(self.url, "another", statement_timeout_s=8.0) as txn:
            self.assertTrue(attempt(txn))
        self.assertRaises(psycopg2.OperationalError, frozen.commit)

    def test_a_job(self) -> None:
        """A job that a frozen session found is found by another session."""
        self.execute("insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:60s', to_timestamp(0))")
        self.check(lambda txn: jobs.attempt(txn, ["tick"]))

    def test_an_order(self) -> None:
        """An order that a frozen session found is found by another session."""
        with blocking(self.url, "give") as txn:
            orders.give(txn, "o", ForceTick.rpc, {"job_type": "tick"}, "somebody", by_link=True)
        self.check(lambda txn: orders.attempt(txn, [ForceTick.rpc], [], [], 0.0, {}))

    async def test_a_claim_that_was_lost(self) -> None:
        """A claim of a worker replaces the worker's earlier claim whose COMMIT arrives late."""
        for key in "ab":
            self.execute(
                "insert into s2s.commands (cmd_type, idem_key, payload) values ('notice.publish', %s, '{}')", key
            )
        lost = psycopg2.connect(self.url)
        self.addCleanup(lost.close)
        [first] = claims.claim(lost.cursor(), "boot", 0, 1)
        found: list[int] = []

        def claim() -> None:
            with blocking(self.url, "again") as txn:
                found.extend(claims.claim(txn, "boot", 0, 10))

        again: Deferred[None] = deferToThread(claim)
        waits = "select 1 from pg_stat_activity where application_name = 'again' and wait_event_type = 'Lock'"
        await poll(lambda: self.execute(waits), "the new claim waits for the lost one")
        lost.commit()
        await again
        [second] = found
        self.assertNotEqual(first, second)
        self.assertEqual(self.execute("select cmd_ids from s2s.batch_notes"), [([second],)])

    def test_a_batch_of_commands(self) -> None:
        """A batch of commands that a frozen session claimed is claimed by another session."""
        self.execute("insert into s2s.commands (cmd_type, idem_key, payload) values ('notice.publish', 'a', '{}')")
        self.check(lambda txn: claims.claim(txn, "boot", 0, 10))
