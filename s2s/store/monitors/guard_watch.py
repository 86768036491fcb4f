"""Telling operators which triggers and rules of another hand may keep rows of ours from being written."""

from __future__ import annotations

from typing import Final, NoReturn

from s2s.errors import StatementRefused
from s2s.runtime.clock import Clock
from s2s.store import kept_rows, migrations
from s2s.store.driver import Cursor, refusable
from s2s.store.kept_rows import Guard, check_written
from s2s.store.monitors.periodic import Periodic
from s2s.store.pool import Database

#: Milliseconds that a trial waits for a lock that another session holds.
_LOCK_MS: Final = 1000
#: Rows that are written, changed and removed on trial, by table: what inserts one, and a column to set.
_TRIALS: Final = {
    "s2s.audit": ("(actor, action) values ('s2s.probe', 's2s.probe')", ""),
    "s2s.broadcasts": ("(message) values ('s2s.probe')", "message"),
    "s2s.commands": ("(cmd_type, idem_key, payload, status) values ('s2s.probe', 's2s.probe', '{}', 'done')", "status"),
    "s2s.idempotency_keys": ("values (gen_random_uuid()::text, sha256('probe'), 0)", "cmd_id"),
    "s2s.outbox": ("(cmd_type, idem_key, payload) values ('s2s.probe', 's2s.probe', '{}')", "attempts"),
    "s2s.steering": (
        "(engine, type, payload, actor, expires_at) values ('s2s.probe', 's2s.probe', '{}', 's2s.probe', now())",
        "engine",
    ),
}


class _Undone(Exception):
    """A trial is over: what it has written goes."""


class GuardWatch(Periodic):
    """Logs once that there is such a trigger or rule, and once that it is gone.

    :ivar kept: why rows are not written, as a trial has shown; empty: they are, or nothing is there to try.
    """

    what = "triggers and rules of others"

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(database, clock)
        self._told: set[Guard] = set()
        self.kept = ""

    def start(self) -> None:
        """Look now, and from now on."""
        self._stopped = self._loop.start(self.interval_s, now=True)

    async def _look(self) -> None:
        found, kept = await self._database.run(look)
        self.kept = "; ".join(kept)
        for guard in found:
            if guard not in self._told:
                self.log.warn(
                    "s2s has not made the {guard}: where it keeps a row from being written, work is done again or not"
                    " at all; to remove it: {cure}",
                    guard=str(guard),
                    cure=guard.cure,
                )
        for guard in self._told.difference(found):
            self.log.info("gone: the {guard}", guard=str(guard))
        self._told = set(found)


def look(txn: Cursor) -> tuple[list[Guard], list[str]]:
    """Find what may keep rows of our tables from being written, and try whether it does.

    Without such a thing nothing is tried.

    :returns: what was found, and a line for each that keeps rows: all rules, and what a trial has shown.
    """
    found = kept_rows.guards(txn, migrations.tables())
    kept = [f"{guard}: {guard.cure}" for guard in found if guard.kind == "rule"]
    for table in sorted({guard.table for guard in found if guard.kind != "rule"} & _TRIALS.keys()):
        try:
            with refusable(txn):
                _try(txn, table)
        except _Undone:
            pass
        except StatementRefused as refused:
            # A lock, or a constraint of another hand, says nothing.
            if refused.state == kept_rows.STATE:
                kept.append(str(refused))
    return found, kept


def _try(txn: Cursor, table: str) -> NoReturn:
    values, column = _TRIALS[table]
    txn.execute(f"set local lock_timeout = {_LOCK_MS}")
    txn.execute(f"insert into {table} {values} returning ctid::text")
    check_written(txn, "insert", table)
    ((place,),) = txn.fetchall()
    if column:
        txn.execute(f"update {table} set {column} = {column} where ctid = %s::tid returning ctid::text", (place,))  # noqa: S608
        check_written(txn, "update", table)
        ((place,),) = txn.fetchall()
        txn.execute(f"delete from {table} where ctid = %s::tid", (place,))  # noqa: S608
        check_written(txn, "delete", table)
    raise _Undone
