"""Table ``jobs``: when each job is due, and where a run goes on (docs/protocol.rst, "The world and its jobs").

Any number of engines share it. A step is two transactions: the first counts an attempt, so that a job that kills its
process is not begun again at once; the second locks the row, does the step, and forgives the attempt. Where the same
engine does the next step, too, the second counts that attempt. Whose row is locked, or was touched by another since,
steps aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg2
from psycopg2.extras import Json

from s2s.errors import RowRefused, StatementRefused
from s2s.store import driver, sqlstate
from s2s.store.driver import Cursor, advisory_lock, lock_key, savepoint, translate_error
from s2s.store.kept_rows import note, refusal
from s2s.store.tables import claims

_ATTEMPTING: Final = lock_key("attempting a job")
#: Until the next attempt, after so many in a row; until this one is begun, nobody else makes one.
_PAUSE: Final = "least(power(2, least({attempts}, 9)), 300) * interval '1 second'"
PAUSE: Final = _PAUSE.format(attempts="attempts")
_FIRST_PAUSE: Final = _PAUSE.format(attempts=0)
#: A row that was written by hand may have the largest number of attempts.
ONE_MORE: Final = "attempts = least(attempts, 1000000) + 1"

#: Seconds that the declaration of a job waits for a session that holds its row.
DECLARE_LOCK_S: Final = 1.0

#: The columns of a :class:`DueJob`.
_DUE: Final = (
    "job_type, floor(extract(epoch from due_at))::bigint, runs, coalesce(state, '{}'), attempts, retry_at, ctid::text"
)
#: Seconds for which a run or an order of many steps goes on in one process without a look at what else is due: a look
#: takes longer the more dead versions of rows an open snapshot keeps.
SLICE_S: Final = 0.25


@dataclass(frozen=True)
class DueJob:
    """A step to do.

    :param due_at: of its run, in Unix seconds.
    :param runs: finished before this one. A clock that was wrong may bring the same ``due_at`` twice, never both.
    :param state: where the run goes on; empty at its beginning.
    :param attempts: with this one, since the run last got on.
    :param retry_at: no other attempt has the same, so that it tells whether this one is still ours to make.
    :param place: where its row was then (``ctid``): by its key a row is found in a time that grows with its dead
        versions, which an open snapshot keeps.
    """

    job_type: str
    due_at: int
    runs: int
    state: Mapping[str, Any]
    attempts: int
    retry_at: datetime
    place: str


@dataclass(frozen=True)
class JobRow:
    """A job as people are shown it.

    :param due_at: of the next run, or of the one that is not finished.
    :param is_running: a run is begun, and not finished.
    """

    job_type: str
    schedule: str
    due_at: datetime
    is_running: bool
    attempts: int
    error: str | None
    runs: int
    last_due_at: datetime | None
    last_finished_at: datetime | None
    last_result: dict[str, Any] | None


class OtherSchedule(NamedTuple):
    """A schedule in the table that this engine does not declare.

    :param is_kept: the engine that declared it lives.
    """

    schedule: str
    is_kept: bool


def declare(
    txn: Cursor, boot_id: str, schedules: Mapping[str, str], next_after: Callable[[str, int], int]
) -> dict[str, str]:
    """Put jobs into the table; those that are there keep their times, unless their schedule has changed.

    :param boot_id: of this engine.
    :param schedules: by job type.
    :param next_after: gives the time that follows a Unix second, by a schedule.
    :returns: by job type, why one is not declared: the database refuses it, or another session holds its row for longer
        than :data:`DECLARE_LOCK_S`.
    """
    now = _now(txn)
    refused: dict[str, str] = {}
    txn.execute("set local lock_timeout = %s", (round(DECLARE_LOCK_S * 1000),))
    # In one order: engines that start together do not wait for each other in a circle.
    for job_type, schedule in sorted(schedules.items()):
        try:
            with savepoint(txn):
                _declare(txn, boot_id, job_type, schedule, next_after(schedule, now))
                # What a deferred constraint or trigger refuses, too.
                txn.execute("set constraints all immediate")
        except psycopg2.Error as error:
            if (meaning := sqlstate.of(error)).fault != "statement" or meaning.drops:
                raise
            refused[job_type] = sqlstate.with_cure(translate_error(error, txn.connection))
    declared = {job_type: schedule for job_type, schedule in schedules.items() if job_type not in refused}
    txn.execute(
        "select from unnest(%s::text[], %s::text[]) own (job_type, schedule) where not exists"
        " (select from s2s.jobs where jobs.job_type = own.job_type and jobs.schedule = own.schedule)",
        (list(declared), list(declared.values())),
    )
    if txn.rowcount:
        note(txn, "insert or update", "s2s.jobs")
    return refused


def _declare(txn: Cursor, boot_id: str, job_type: str, schedule: str, due_at: int) -> None:
    txn.execute(
        "insert into s2s.jobs as j (job_type, schedule, due_at, declared_by)"
        " select %(job_type)s, %(schedule)s, to_timestamp(%(due_at)s), %(boot_id)s"
        # What is as it should be is not locked: somebody may be running it.
        " where not exists (select from s2s.jobs where job_type = %(job_type)s and schedule = %(schedule)s)"
        " on conflict (job_type) do update set schedule = excluded.schedule,"
        " declared_by = excluded.declared_by,"
        # A run that is begun is finished first, with its time.
        " due_at = case when j.state is null then excluded.due_at else j.due_at end,"
        " attempts = case when j.state is null then 0 else j.attempts end,"
        " retry_at = case when j.state is null then null else j.retry_at end"
        " where j.schedule <> excluded.schedule",
        {"job_type": job_type, "schedule": schedule, "due_at": due_at, "boot_id": boot_id},
    )


def missing(txn: Cursor, job_types: Iterable[str]) -> list[str]:
    """Return those of some jobs that are not in the table."""
    return driver.missing(txn, "s2s.jobs", "job_type", job_types)


def other_schedules(txn: Cursor, boot_id: str, schedules: Mapping[str, str]) -> dict[str, OtherSchedule]:
    """Return the jobs whose schedule in the table is not the one that this engine declares, by job type.

    :param boot_id: of this engine. What it has declared was changed by hand, and is kept by no engine.
    :param schedules: by job type.
    """
    txn.execute(
        "select job_type, jobs.schedule, declared_by from s2s.jobs"
        " join unnest(%s::text[], %s::text[]) own (job_type, schedule) using (job_type)"
        " where jobs.schedule <> own.schedule order by job_type",
        (list(schedules), list(schedules.values())),
    )
    rows = txn.fetchall()
    living = claims.present(txn, {declared_by for *_, declared_by in rows if declared_by} - {boot_id})
    return {job_type: OtherSchedule(schedule, declared_by in living) for job_type, schedule, declared_by in rows}


def hold_idle(txn: Cursor, job_types: Iterable[str]) -> list[str]:
    """Lock those of some jobs that no engine is running until the transaction ends, and return their types."""
    txn.execute("select job_type from s2s.jobs where job_type = any(%s) for update skip locked", (list(job_types),))
    return [job_type for (job_type,) in txn]


def attempt(txn: Cursor, job_types: Iterable[str], turns: Sequence[str] = ()) -> DueJob | None:
    """Count an attempt of the job that is due for the longest time.

    :param job_types: those that the caller can run now.
    :param turns: those that have had a turn, the last one at the end. The others come first, then these in their order:
        the runs of long ones, which stay due, would hold up all others.
    :raises RowRefused: the database does not take the change of that row.
    """
    # One looks at a time. With an older snapshot one would lock what another has just counted, to find that it is not
    # due: the other would see it locked, and step aside from its own attempt.
    advisory_lock(txn, _ATTEMPTING)
    txn.execute(
        "select job_type, ctid::text from s2s.jobs where job_type = any(%s)"
        # A run that is begun goes on, whatever the clock has called its time meanwhile.
        " and (due_at <= now() or state is not null or attempts > 0)"
        " and (retry_at is null or retry_at <= now())"
        " order by array_position(%s::text[], job_type) nulls first, due_at, job_type limit 1 for update skip locked",
        (list(job_types), list(turns)),
    )
    row = txn.fetchone()
    if row is None:
        return None
    change = f"update s2s.jobs set {ONE_MORE}, retry_at = now() + {PAUSE} where"  # noqa: S608 - a constant
    found = change_row(txn, change, place=row[1], key=("job_type", row[0]), returning=_DUE, written="retry_at > now()")
    return DueJob(*found)


def release(txn: Cursor, job: DueJob) -> None:
    """Take an attempt back that was not begun."""
    txn.execute(
        "update s2s.jobs set attempts = attempts - 1, retry_at = null where job_type = %s and retry_at = %s",
        (job.job_type, job.retry_at),
    )
    _note_kept(txn, job)


def _note_kept(txn: Cursor, job: DueJob) -> None:
    """Tell the operator where the last statement should have changed an attempt that is ours still, and has not."""
    if not txn.rowcount:
        txn.execute("select from s2s.jobs where job_type = %s and retry_at = %s", (job.job_type, job.retry_at))
        if txn.fetchall():
            note(txn, "update", "s2s.jobs")


def next_due_s(txn: Cursor, job_types: Iterable[str]) -> float | None:
    """Give the seconds until the next job becomes due; ``None``: none does. One that is due by now is another's."""
    txn.execute(
        "select extract(epoch from least(min(greatest(due_at, retry_at)), now() + interval '1 day') - now())::float8"
        " from s2s.jobs"
        " where job_type = any(%s) and greatest(due_at, retry_at) > now()",
        (list(job_types),),
    )
    seconds = (txn.fetchone() or (None,))[0]
    return None if seconds is None else float(seconds)


def hold(txn: Cursor, job: DueJob) -> str | None:
    """Lock a job until the transaction ends.

    :returns: the place of its row; ``None``: the attempt is no longer ours to make.
    """
    where = "job_type = %(job_type)s and retry_at = %(retry_at)s"
    return hold_row(txn, "s2s.jobs", where, vars(job))


def hold_row(txn: Cursor, table: str, where: str, params: Mapping[str, Any], waits: bool = False) -> str | None:
    """Lock a row until the transaction ends, which is looked for at its last place first.

    :param where: what must be true of it, with named parameters.
    :param params: of ``where``, and its ``place``; an empty one is not known.
    :param waits: wait for a session that holds it.
    :returns: its place, which it keeps until it is changed; ``None``: there is none, or another session holds it.
    """
    at_once = "" if waits else " skip locked"
    for at in ("ctid = %(place)s::tid and ", "") if params["place"] else ("",):
        txn.execute(f"select ctid::text from {table} where {at}{where} for update{at_once}", params)  # noqa: S608
        row = txn.fetchone()
        if row is not None:
            return str(row[0])
    return None


def hold_still(txn: Cursor, job_type: str) -> None:
    """Let nobody else run a job until this transaction ends; whoever does so now is waited for."""
    txn.execute("select from s2s.jobs where job_type = %s for update", (job_type,))


def go_on(txn: Cursor, job: DueJob, place: str, state: Mapping[str, Any], is_next_ours: bool) -> DueJob | None:
    """Store where a run goes on: its next step is due at once.

    :param place: of its row, which :func:`hold` has locked, unless the job has changed it since.
    :param is_next_ours: count an attempt of that step, too: the caller does it next, without another look.
    :returns: that attempt.
    """
    change = f"update s2s.jobs set state = %s, {next_attempt(is_next_ours)}, error = null where"  # noqa: S608 - constants
    row = change_row(
        txn,
        change,
        Json(dict(state)),
        place=place,
        key=("job_type", job.job_type),
        returning=_DUE,
        written=has_next_attempt(is_next_ours),
    )
    return DueJob(*row) if is_next_ours else None


def change_row(
    txn: Cursor, change: str, *params: Any, place: str, key: tuple[str, str], returning: str, written: str = "true"
) -> tuple[Any, ...]:
    """Change a row, which is looked for at its last place first.

    :param change: the statement up to its ``where``, with the ``params``.
    :param key: the column and the value of its primary key.
    :param returning: the columns to return.
    :param written: what is true of the row once it is changed: a trigger may return the old row.
    :raises RowRefused: the database does not take the change.
    """
    column, value = key
    for where, more in ((f"ctid = %s::tid and {column} = %s", (place, value)), (f"{column} = %s", (value,))):
        try:
            txn.execute(f"{change} {where} returning {written}, {returning}", (*params, *more))
        except psycopg2.Error as error:
            refused = translate_error(error, txn.connection)
            if isinstance(refused, StatementRefused):
                raise RowRefused(value, refused) from None
            raise
        row = txn.fetchone()
        if row is not None and not row[0]:
            break
        if row is not None:
            return tuple(row[1:])
    raise RowRefused(value, refusal(txn, "update", change.split()[1]))


def check_changed(txn: Cursor, table: str, column: str, value: str) -> None:
    """Refuse to end a step whose row the last statement has not changed, unless the step has removed the row.

    The step would be done again, and its effect be doubled. The statement may return whether the row has its values: a
    trigger may return the old row.

    :raises RowRefused: a trigger has kept the row.
    """
    if not (txn.rowcount and (txn.description is None or txn.fetchone() == (True,))):
        txn.execute(f"select from {table} where {column} = %s", (value,))
        if txn.rowcount:
            raise RowRefused(value, refusal(txn, "update", table))


def next_attempt(is_ours: bool) -> str:
    """Return what is set of a row whose step has got on.

    :param is_ours: whether the caller makes the first attempt of the next step, or whoever looks.
    """
    first = f"attempts = 1, retry_at = now() + {_FIRST_PAUSE}"
    return first if is_ours else "attempts = 0, retry_at = null"


def has_next_attempt(is_ours: bool) -> str:
    """Return the condition that holds once :func:`next_attempt` is set."""
    return f"retry_at = now() + {_FIRST_PAUSE}" if is_ours else "retry_at is null"


def finish(txn: Cursor, job: DueJob, next_after: Callable[[str, int], int], result: Mapping[str, Any] | None) -> None:
    """End a run. Runs that were missed meanwhile are made up for by this one.

    :param next_after: gives the time that follows a Unix second, by a schedule.
    :raises RowRefused: a trigger has kept the row from being changed.
    """
    txn.execute("select schedule from s2s.jobs where job_type = %s", (job.job_type,))
    schedule = str((txn.fetchone() or ("",))[0])
    txn.execute(
        "update s2s.jobs set state = null, attempts = 0, retry_at = null, error = null, runs = runs + 1,"
        " last_due_at = due_at, last_finished_at = clock_timestamp(), last_result = %s, due_at = to_timestamp(%s)"
        " where job_type = %s returning attempts = 0 and retry_at is null",
        (
            None if result is None else Json(dict(result)),
            next_after(schedule, max(job.due_at, _now(txn))),
            job.job_type,
        ),
    )
    check_changed(txn, "s2s.jobs", "job_type", job.job_type)


def fail(txn: Cursor, job: DueJob, error: str) -> None:
    """Store why a step failed, unless it is another's by now; it is tried again after a pause that grows."""
    txn.execute(
        f"update s2s.jobs set error = %s, retry_at = now() + {PAUSE} where job_type = %s and retry_at = %s",  # noqa: S608
        (error, job.job_type, job.retry_at),
    )
    _note_kept(txn, job)


def list_jobs(txn: Cursor) -> list[JobRow]:
    """List the jobs by name."""
    txn.execute(
        "select job_type, schedule, due_at, state is not null, attempts, error, runs, last_due_at, last_finished_at,"
        " last_result from s2s.jobs order by job_type"
    )
    return [JobRow(*row) for row in txn]


def _now(txn: Cursor) -> int:
    """Give the database's time in Unix seconds, rounded down: engines whose clocks differ agree."""
    txn.execute("select floor(extract(epoch from now()))::bigint")
    return int((txn.fetchone() or (0,))[0])
