"""A database that is read-only for a while: sessions begun in that time remain so (:mod:`s2s.store.sqlstate`)."""

from __future__ import annotations

from typing import Any

from twisted.logger import capturedLogs

from s2s.errors import DatabaseUnavailable
from s2s.roles.server.inbox import Inbox
from s2s.runtime.clock import Clock
from s2s.store.driver import Cursor, Query, Steps
from s2s.store.monitors.database_probe import HOLDS_S, DatabaseProbe
from s2s.store.pool import Database
from tests.support.postgres import DatabaseTestCase


def _write(txn: Cursor) -> None:
    txn.execute("insert into public.made values (1)")


def _steps() -> Steps[Any]:
    return (yield Query("insert into public.made values (1) returning n", ()))


class ReadOnlyTests(DatabaseTestCase):
    """Calls with a thread and queries without one."""

    def setUp(self) -> None:
        """Make a table, and make new sessions read-only."""
        super().setUp()
        self.execute("create table public.made (n integer)")
        self.name = self.url.partition("?")[0].rpartition("/")[2]
        self.set("on")
        self.database = Database(self.url, threads=2)
        self.database.start()
        self.addCleanup(self.database.stop)

    def set(self, value: str) -> None:
        """Set whether new sessions are read-only."""
        self.execute(f"alter database {self.name} set default_transaction_read_only = {value}")

    async def test_it_heals(self) -> None:
        """A refused write is unavailable and logged once; after the read-only time, the next write succeeds."""
        with capturedLogs() as told:
            for _ in range(3):
                error = await self.assertFailure(self.database.run(_write), DatabaseUnavailable)
                self.assertEqual(error.state, "25006")
                await self.assertFailure(self.database.run_steps(_steps), DatabaseUnavailable)
        self.assertEqual([event["state"] for event in told if "state" in event], ["25006"])
        self.set("off")
        await self.database.run(_write)
        await self.database.run_steps(_steps)
        self.assertEqual(self.execute("select count(*) from public.made"), [(2,)])

    async def test_errors_that_end_the_session(self) -> None:
        """With ``exit_on_error`` the refusal has its SQLSTATE as well, and so its fix."""
        self.execute(f"alter database {self.name} set exit_on_error = on")
        error = await self.assertFailure(self.database.run(_write), DatabaseUnavailable)
        self.assertEqual(error.state, "25006")
        error = await self.assertFailure(self.database.run_steps(_steps), DatabaseUnavailable)
        self.assertEqual(error.state, "25006")

    async def test_it_is_not_ready(self) -> None:
        """The probe and the inbox report the reason, and report ok after the read-only time."""
        clock = Clock(pool_reactor := self.database.reactor)
        pulse, inbox = DatabaseProbe(self.database, clock), Inbox(self.database, {}, reactor=pool_reactor)
        self.assertIn("read-only transaction", await pulse.check())
        inbox._note(await self.assertFailure(self.database.run(_write), DatabaseUnavailable))
        self.assertIn("read-only transaction", inbox.condition)
        self.set("off")
        pulse._answered_at -= HOLDS_S
        self.assertEqual(await pulse.check(), "ok")
        inbox._committed([], [])
        self.assertEqual(inbox.condition, "ok")
