"""Table ``jobs``: when each job is due, and where its run continues (docs/protocol.rst, "The world and its jobs").

Any number of engines share the table. A step takes two transactions. The first one counts an attempt, so that a job
that kills its process does not start again at once. The second one locks the row, does the step, and resets the
attempts; if the same engine does the next step as well, it also counts that attempt. An engine gives up its attempt if
another session has locked the row or has changed it since.
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
#: The pause after this number of attempts in a row; no other attempt starts before it ends.
_PAUSE: Final = "least(power(2, least({attempts}, 9)), 300) * interval '1 second'"
PAUSE: Final = _PAUSE.format(attempts="attempts")
_FIRST_PAUSE: Final = _PAUSE.format(attempts=0)
#: SQL that counts an attempt; it is bounded because a row that was written by hand may have the largest number.
ONE_MORE: Final = "attempts = least(attempts, 1000000) + 1"

#: Seconds that the declaration of a job waits for a session that holds its row.
DECLARE_LOCK_S: Final = 1.0

#: The columns of a :class:`DueJob`.
_DUE: Final = (
    "job_type, floor(extract(epoch from due_at))::bigint, runs, coalesce(state, '{}'), attempts, retry_at, ctid::text"
)
#: Seconds for which one process continues a run or an order of many steps without looking for other due rows: such a
#: look takes longer the more dead row versions an open snapshot keeps.
SLICE_S: Final = 0.25


@dataclass(frozen=True)
class DueJob:
    """A step to do.

    :param due_at: the ``due_at`` of its run, in Unix seconds.
    :param runs: the number of runs finished before this one. A wrong clock may repeat a ``due_at``, but never the pair
        of both.
    :param state: where the run continues; empty at its beginning.
    :param attempts: the number of attempts since the run's last progress, with this one.
    :param retry_at: unique to each attempt, so that it shows whether this attempt still belongs to the caller.
    :param place: the ``ctid`` of its row at that time. A lookup by key takes longer the more dead versions of the row
        an open snapshot keeps.
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
    """A job as operators see it.

    :param due_at: the ``due_at`` of the next run, or of the unfinished one.
    :param is_running: a run has begun and is not finished.
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
    """A schedule in the table that differs from the one that this engine declares.

    :param is_kept: the engine that declared the schedule lives.
    """

    schedule: str
    is_kept: bool


def declare(
    txn: Cursor, boot_id: str, schedules: Mapping[str, str], next_after: Callable[[str, int], int]
) -> dict[str, str]:
    """Insert jobs into the table. Existing jobs keep their times, unless their schedule has changed.

    :param boot_id: the ``boot_id`` of this engine.
    :param schedules: the schedule of each job type.
    :param next_after: returns the schedule's next time after a time in Unix seconds.
    :returns: by job type, why a job is not declared: the database refuses it, or another session holds its row for
        longer than :data:`DECLARE_LOCK_S`.
    """
    now = _now(txn)
    refused: dict[str, str] = {}
    txn.execute("set local lock_timeout = %s", (round(DECLARE_LOCK_S * 1000),))
    # In one order, so that engines that start together do not deadlock.
    for job_type, schedule in sorted(schedules.items()):
        try:
            with savepoint(txn):
                _declare(txn, boot_id, job_type, schedule, next_after(schedule, now))
                # Run deferred constraints and triggers now, so that their errors are caught here.
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
        # A row that already matches is not locked: an engine may be running its job.
        " where not exists (select from s2s.jobs where job_type = %(job_type)s and schedule = %(schedule)s)"
        " on conflict (job_type) do update set schedule = excluded.schedule,"
        " declared_by = excluded.declared_by,"
        # A run that has begun is finished first, with its own due_at.
        " due_at = case when j.state is null then excluded.due_at else j.due_at end,"
        " attempts = case when j.state is null then 0 else j.attempts end,"
        " retry_at = case when j.state is null then null else j.retry_at end"
        " where j.schedule <> excluded.schedule",
        {"job_type": job_type, "schedule": schedule, "due_at": due_at, "boot_id": boot_id},
    )


def missing(txn: Cursor, job_types: Iterable[str]) -> list[str]:
    """Return the given jobs that are not in the table."""
    return driver.missing(txn, "s2s.jobs", "job_type", job_types)


def other_schedules(txn: Cursor, boot_id: str, schedules: Mapping[str, str]) -> dict[str, OtherSchedule]:
    """Return the jobs whose schedule in the table differs from the one that this engine declares, by job type.

    :param boot_id: the ``boot_id`` of this engine. If this engine declared the row, the schedule was changed by hand,
        and no engine keeps it.
    :param schedules: the schedule of each job type.
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
    """Lock the given jobs that no engine is running until the transaction ends, and return their types."""
    txn.execute("select job_type from s2s.jobs where job_type = any(%s) for update skip locked", (list(job_types),))
    return [job_type for (job_type,) in txn]


def attempt(txn: Cursor, job_types: Iterable[str], turns: Sequence[str] = ()) -> DueJob | None:
    """Count an attempt of the job that has been due longest.

    :param job_types: the jobs that the caller can run now.
    :param turns: the jobs that have had a turn, the latest one last. Other jobs come first, then these in their order:
        otherwise a job with a long run, which stays due, would delay all others.
    :raises RowRefused: the database refuses the change of that row.
    """
    # One engine looks at a time. Otherwise an engine with an older snapshot could lock a row whose attempt another
    # engine has just counted, and find that it is not due; the other engine would find the row locked and give up its
    # own attempt.
    advisory_lock(txn, _ATTEMPTING)
    txn.execute(
        "select job_type, ctid::text from s2s.jobs where job_type = any(%s)"
        # A run that has begun continues, even if a clock change has moved now() before its due_at.
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
    """Undo the count of an attempt that was not begun."""
    txn.execute(
        "update s2s.jobs set attempts = attempts - 1, retry_at = null where job_type = %s and retry_at = %s",
        (job.job_type, job.retry_at),
    )
    _note_kept(txn, job)


def _note_kept(txn: Cursor, job: DueJob) -> None:
    """Report to the operator if the last statement did not change an attempt that still belongs to the caller."""
    if not txn.rowcount:
        txn.execute("select from s2s.jobs where job_type = %s and retry_at = %s", (job.job_type, job.retry_at))
        if txn.fetchall():
            note(txn, "update", "s2s.jobs")


def next_due_s(txn: Cursor, job_types: Iterable[str]) -> float | None:
    """Return the seconds until the next job becomes due; ``None``: none does. Jobs that are due by now do not count."""
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

    :returns: the ``ctid`` of its row; ``None``: the attempt no longer belongs to the caller.
    """
    where = "job_type = %(job_type)s and retry_at = %(retry_at)s"
    return hold_row(txn, "s2s.jobs", where, vars(job))


def hold_row(txn: Cursor, table: str, where: str, params: Mapping[str, Any], waits: bool = False) -> str | None:
    """Lock a row until the transaction ends; look for it at its last known place first.

    :param where: the condition for the row, with named parameters.
    :param params: the parameters of ``where``, and the row's ``place``; an empty one is not known.
    :param waits: wait for a session that holds the row.
    :returns: its ``ctid``, which stays until the row changes; ``None``: there is no such row, or another session holds
        it.
    """
    at_once = "" if waits else " skip locked"
    for at in ("ctid = %(place)s::tid and ", "") if params["place"] else ("",):
        txn.execute(f"select ctid::text from {table} where {at}{where} for update{at_once}", params)  # noqa: S608
        row = txn.fetchone()
        if row is not None:
            return str(row[0])
    return None


def hold_still(txn: Cursor, job_type: str) -> None:
    """Keep other engines from running a job until this transaction ends; wait for an engine that runs it now."""
    txn.execute("select from s2s.jobs where job_type = %s for update", (job_type,))


def go_on(txn: Cursor, job: DueJob, place: str, state: Mapping[str, Any], is_next_ours: bool) -> DueJob | None:
    """Store where a run continues; its next step is due at once.

    :param place: the ``ctid`` of its row, as :func:`hold` returned it; the job may have changed the row since.
    :param is_next_ours: also count an attempt of the next step, which the caller does without another look at the
        table.
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
    """Change a row; look for it at its last known place first.

    :param change: the statement up to its ``where``, with the ``params``.
    :param key: the column and the value of its primary key.
    :param returning: the columns to return.
    :param written: an SQL condition that holds for the changed row; a trigger may return the old row.
    :raises RowRefused: the database refuses the change.
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
    """Raise if the last statement did not change the row of a step, unless the step has removed the row.

    Otherwise the step would be done again, and its effect would be doubled. The statement may return whether the row
    has the new values, because a trigger may return the old row.

    :raises RowRefused: a trigger kept the row unchanged.
    """
    if not (txn.rowcount and (txn.description is None or txn.fetchone() == (True,))):
        txn.execute(f"select from {table} where {column} = %s", (value,))
        if txn.rowcount:
            raise RowRefused(value, refusal(txn, "update", table))


def next_attempt(is_ours: bool) -> str:
    """Return the SQL assignments for a row whose step has made progress.

    :param is_ours: whether the caller makes the first attempt of the next step; else any engine does.
    """
    first = f"attempts = 1, retry_at = now() + {_FIRST_PAUSE}"
    return first if is_ours else "attempts = 0, retry_at = null"


def has_next_attempt(is_ours: bool) -> str:
    """Return the condition that holds once :func:`next_attempt` is set."""
    return f"retry_at = now() + {_FIRST_PAUSE}" if is_ours else "retry_at is null"


def finish(txn: Cursor, job: DueJob, next_after: Callable[[str, int], int], result: Mapping[str, Any] | None) -> None:
    """End a run. It also stands for the runs that were missed meanwhile.

    :param next_after: returns the schedule's next time after a time in Unix seconds.
    :raises RowRefused: a trigger kept the row unchanged.
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
    """Store why a step failed, unless the attempt no longer belongs to the caller. The next attempt follows a pause."""
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
    """Return the database's time in Unix seconds, rounded down, so that engines whose clocks differ agree."""
    txn.execute("select floor(extract(epoch from now()))::bigint")
    return int((txn.fetchone() or (0,))[0])
