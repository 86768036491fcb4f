"""The base class of jobs that move values towards a goal (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from s2s import Cursor, Job, JobRun, Outcome, Unfinished

#: The largest number of rows that one transaction reads: another session waits for a row no longer than that takes.
BATCH_ROWS: Final = 20_000
#: The lifetime of a notice in seconds.
TTL_S: Final = 3600


class DriftJob(Job):
    """A job that moves column values of a table towards their goals, batch by batch, at one rate.

    A value moves by ``rate`` permille of its distance, rounded up, so that it reaches its goal and never passes it.

    :cvar rate: the setting that contains the rate, 0 to 1000.
    :cvar table: the table, whose rows belong to sectors.
    :cvar row_id: the primary key of the table, a positive number.
    :cvar goals: the expression of the goal by column; values and goals are from 0 to 2^53-1.
    :cvar statuses: only rows in sectors with these statuses are changed.
    :cvar counts: the names of two numbers in the result: the rows that changed, and those of them that are now at all
        of their goals.
    :cvar message: the text of the notice if rows have reached all of their goals, with ``{}`` for their number.
    :param batch_rows: see :data:`BATCH_ROWS`.
    """

    rate: ClassVar[str]
    table: ClassVar[str]
    row_id: ClassVar[str]
    goals: ClassVar[Mapping[str, str]]
    statuses: ClassVar[tuple[str, ...]]
    counts: ClassVar[tuple[str, str]]
    message: ClassVar[str]

    def __init__(self, batch_rows: int = BATCH_ROWS) -> None:
        self._batch_rows = batch_rows

    def run(self, txn: Cursor, run: JobRun) -> Outcome:
        """Run the next batch. After the last batch, emit a notice if any rows have reached their goals."""
        changed, arrived = self.counts
        state = run.state or {"rate": run.setting(self.rate), "after": 0, changed: 0, arrived: 0}
        txn.execute(self._statement(), {**state, "batch_rows": self._batch_rows})
        rows, last, *counted = txn.fetchone() or ()
        done = {name: state[name] + count for name, count in zip(self.counts, counted, strict=True)}
        if rows == self._batch_rows:
            return Unfinished({**state, **done, "after": last})
        if done[arrived]:
            message = self.message.format(done[arrived])
            notice = {"scope": "global", "message": message, "severity": "info", "ttl_s": TTL_S}
            run.emit("notice.publish", run.key, notice)
        return done

    def _statement(self) -> str:
        """Return the statement of a batch. Every name in it is a constant of the class."""
        row_id = self.row_id
        drifts = ", ".join(f"{value} = {_drift(value, goal)}" for value, goal in self.goals.items())
        statuses = ", ".join(f"'{status}'" for status in self.statuses)
        is_away = f"({', '.join(self.goals)}) <> ({', '.join(self.goals.values())})"
        # The UPDATE itself reads the values, so that it uses the current values of a row that another transaction has
        # just changed.
        return (
            f"with batch as (select {row_id} as id from {self.table} where {row_id} > %(after)s"  # noqa: S608
            f" order by {row_id} limit %(batch_rows)s),"
            f" changed as (update {self.table} r set {drifts} from s2s_world.sectors s where r.{row_id} > %(after)s"
            f" and r.{row_id} <= (select max(id) from batch) and s.sector_id = r.sector_id"
            f" and s.status in ({statuses}) and %(rate)s > 0 and {is_away} returning {is_away} as is_away)"
            " select (select count(*) from batch), (select max(id) from batch), count(*),"
            " count(*) filter (where not is_away) from changed"
        )


def _drift(value: str, goal: str) -> str:
    """Return the expression of a value after one move. Division in SQL truncates toward zero.

    No number overflows: the distance times the rate is at most 2^53 times 1000, and a ``bigint`` goes to 2^63.
    """
    way = f"({goal} - {value})"
    return f"{value} + ({way} * %(rate)s + case when {way} < 0 then -999 else 999 end) / 1000"
