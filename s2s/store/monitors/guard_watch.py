"""Report foreign triggers, rules and constraints that may keep rows of s2s from being written."""

from __future__ import annotations

from typing import Final

import psycopg2

from s2s.errors import StatementRefused
from s2s.runtime.clock import Clock
from s2s.store import kept_rows, migrations, shape
from s2s.store.driver import Cursor, is_broken
from s2s.store.kept_rows import Guard, check_written
from s2s.store.lock_wait import trial
from s2s.store.monitors.periodic import Periodic
from s2s.store.pool import Database

#: The trial rows, by table: the end of the INSERT, a column to set, and its new value. A row without a column to set is
#: only inserted.
_TRIALS: Final = {
    "s2s.audit": ("(actor, action) values ('s2s.probe', 's2s.probe')", "", ""),
    "s2s.broadcasts": ("(message) values ('s2s.probe')", "message", "'s2s.other'"),
    "s2s.commands": (
        "(cmd_type, idem_key, payload, status) values ('s2s.probe', 's2s.probe', '{}', 'done')",
        "status",
        "'dead'",
    ),
    "s2s.idempotency_keys": ("values (gen_random_uuid()::text, sha256('probe'), 0)", "cmd_id", "1"),
    "s2s.outbox": ("(cmd_type, idem_key, payload) values ('s2s.probe', 's2s.probe', '{}')", "attempts", "1"),
    "s2s.steering": (
        "(engine, type, payload, actor, expires_at) values ('s2s.probe', 's2s.probe', '{}', 's2s.probe', now())",
        "engine",
        "'s2s.other'",
    ),
}


class GuardWatch(Periodic):
    """Logs each foreign trigger, rule, policy, constraint or unique index when it appears, and when it is gone.

    :ivar kept: the triggers, rules and policies that keep rows from being written; empty: there are none.
    """

    subject = "triggers, rules and constraints of others"

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(database, clock)
        self._told: set[Guard] = set()
        self.kept = ""

    def start(self) -> None:
        """Check now, and then periodically."""
        self._stopped = self._loop.start(self.interval_s, now=True)

    async def _look(self) -> None:
        found, kept = await self._database.run(look)
        self.kept = "; ".join(kept)
        for guard in found:
            if guard not in self._told:
                self.log.warn(
                    "s2s has not made the {guard}: {effect}; to remove it: {cure}",
                    guard=str(guard),
                    effect=guard.effect,
                    cure=guard.cure,
                )
        for guard in self._told.difference(found):
            self.log.info("gone: the {guard}", guard=str(guard))
        self._told = set(found)


def look(txn: Cursor) -> tuple[list[Guard], list[str]]:
    """Find the guards that may keep rows of s2s tables from being written, and test by a trial whether they do.

    Tables without a guard are not tested.

    :returns: the guards found, and a line for each rule and each table whose trial failed.
    """
    found = kept_rows.guards(txn, migrations.tables())
    kept = [f"{guard}: {guard.cure}" for guard in found if guard.kind == "rule"]
    for table in sorted({guard.table for guard in found if guard.kind != "rule"} & _TRIALS.keys()):
        try:
            with trial(txn):
                _try(txn, table)
        except StatementRefused as refused:
            kept.append(str(refused))
        except psycopg2.Error:
            # Neither a lock nor a foreign constraint shows that a row is kept.
            if is_broken(txn.connection):
                raise
    return [*found, *shape.foreign(txn)], kept


def _try(txn: Cursor, table: str) -> None:
    values, column, value = _TRIALS[table]
    txn.execute(f"insert into {table} {values} returning ctid::text")
    check_written(txn, "insert", table)
    ((place,),) = txn.fetchall()
    if column:
        txn.execute(
            f"update {table} set {column} = {value} where ctid = %s::tid returning ctid::text, {column} = {value}",  # noqa: S608
            (place,),
        )
        check_written(txn, "update", table)
        ((place, is_set),) = txn.fetchall()
        # If a trigger returns the old row, the statement counts the row as written.
        if not is_set:
            raise kept_rows.refusal(txn, "update", table)
        txn.execute(f"delete from {table} where ctid = %s::tid", (place,))  # noqa: S608
        check_written(txn, "delete", table)
