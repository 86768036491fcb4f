"""Remove finished commands, expired keys and old control requests.

Every function here is one bounded step, for a transaction of its own. No step waits for a row that another transaction
has locked, so any number of processes may run steps at once, beside pushes and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from s2s.errors import DatabaseError, StatementRefused
from s2s.protocol.catalogue import HEALTH_CHECK
from s2s.protocol.settings import BY_KEY
from s2s.store import kept_rows
from s2s.store.connection import PlanningConnection
from s2s.store.driver import Cursor, refusable
from s2s.store.kept_rows import note, still_there
from s2s.store.tables.clock_drift import SLACK_S
from s2s.store.tables.singly import HELD, singly

K = TypeVar("K")

#: The most rows that one step reads.
STEP_ROWS: Final = 1000
#: Days that a control request and its answer are kept.
STEERING_DAYS: Final = 7
#: How long a health check is kept if its client has gone away: longer than any client waits.
_HEALTH_KEPT: Final = "interval '10 minutes'"
#: The most that one pass advances the time of retention (``retention_at``), against which age is measured. A clock that
#: is years ahead thus cannot remove a row that is more than an hour too young. After an outage, that time catches up
#: six hours in each hour.
ADVANCE: Final = "interval '1 hour'"
#: A time before s2s existed, in SQL. An older time was written by a clock that was not set.
UNSET: Final = "timestamptz '2020-01-01 00:00:00+00'"
_NOW: Final = "(select retention_at from s2s.database)"
_SOON: Final = f"now() + interval '{SLACK_S} seconds'"


@dataclass(frozen=True)
class Keep:
    """The retention periods (docs/protocol.rst, "Commands").

    :param days: days that a done or cancelled command is kept after its end.
    :param dead_days: days that a dead command is kept after its end.
    :param key_days: days that an ``idem_key`` is kept after its command's row is removed.
    """

    days: int
    dead_days: int
    key_days: int


def keep(txn: Cursor) -> Keep:
    """Return the retention periods that apply now: the settings in the table, or the defaults."""
    names = ("commands.keep_days", "commands.keep_dead_days", "commands.keep_key_days")
    txn.execute("select key, value from s2s.config where key = any(%s)", (list(names),))
    set_here = dict(txn.fetchall())
    return Keep(*(int(set_here.get(name, BY_KEY[name].default)) for name in names))


#: Removes commands whose rows the caller has locked. Their keys stay until they expire and keep the final status.
REMOVE: Final = """
with removed as (
    delete from s2s.commands where cmd_id = any(%(ids)s::bigint[]) returning cmd_id, idem_key, status
), kept as (
    update s2s.idempotency_keys k set status = r.status, expires_at = now() + make_interval(days => %(key_days)s)
    from removed r where k.idem_key = r.idem_key and k.cmd_id = r.cmd_id
    returning k.cmd_id, k.expires_at
)
select cmd_id, 'discarded', idem_key, kept.expires_at is not null from removed left join kept using (cmd_id)
"""


def advance(txn: Cursor) -> float:
    """Advance retention's time towards the database's clock, by :data:`ADVANCE` at most.

    A time before :data:`UNSET` is replaced by the present: it would take years to catch up, and limits nothing.

    :returns: the seconds that retention's time is still behind the clock.
    """
    txn.execute(
        "insert into s2s.database as d default values on conflict (only_row) do update"  # noqa: S608 - a constant
        f" set retention_at = case when d.retention_at < {UNSET} then now()"
        f" else least(now(), d.retention_at + {ADVANCE}) end"
        " returning extract(epoch from now() - d.retention_at)::float8"
    )
    row = txn.fetchone()
    if row is None:
        note(txn, "insert or update", "s2s.database")
    return float((row or (0.0,))[0])


def sweep_commands(txn: Cursor, after: int, keep: Keep) -> tuple[int, int | None]:
    """Remove the old finished commands among the next commands in the order of their ids.

    :param after: the ``cmd_id`` where the previous step ended; 0 at first.
    :returns: how many commands were removed, and where the next step begins; ``None``: the following ones are too
        young.
    """
    txn.execute(
        # A created_at in the future was written by a clock that was ahead, so it does not show the age of the following
        # rows. A finished_at in the future, or from a clock that was not set, is replaced by now.
        f"select cmd_id, created_at <= {_NOW} - make_interval(days => %s) or created_at > {_SOON},"  # noqa: S608
        f" finished_at > {_SOON} or (finished_at < {UNSET} and now() >= {UNSET})"
        " from s2s.commands where cmd_id > %s order by cmd_id limit %s",
        (min(keep.days, keep.dead_days), after, STEP_ROWS),
    )
    page = txn.fetchall()
    cmd_ids = [cmd_id for cmd_id, *_ in page]
    if misdated := [cmd_id for cmd_id, _, is_misdated in page if is_misdated]:
        _write(txn, "update", "s2s.commands", misdated, _redate_commands)
    txn.execute(
        "select cmd_id from s2s.commands where cmd_id = any(%s::bigint[]) and status <> 'ready'"  # noqa: S608
        # A command that was ended by hand may have no finished_at.
        " and coalesce(finished_at, created_at)"
        f" <= {_NOW} - make_interval(days => case status when 'dead' then %s else %s end) for update skip locked",
        (cmd_ids, keep.dead_days, keep.days),
    )
    over = [cmd_id for (cmd_id,) in txn]

    def remove(txn: Cursor, cmd_ids: Sequence[int]) -> int:
        txn.execute(REMOVE, {"ids": list(cmd_ids), "key_days": keep.key_days})
        rows = txn.fetchall()
        if len(rows) < len(cmd_ids):
            note(txn, "delete", "s2s.commands")
        note_keys(txn, rows)
        return len(rows)

    removed = _write(txn, "delete", "s2s.commands", over, remove)
    # Ids are drawn nearly in the order of time: a page of only young rows is the end, a single young row may be a
    # stray.
    is_last = len(page) < STEP_ROWS or not any(is_old for _, is_old, _ in page)
    return removed, None if is_last else cmd_ids[-1]


def _redate_commands(txn: Cursor, cmd_ids: Sequence[int]) -> int:
    txn.execute(
        "update s2s.commands set finished_at = now() where cmd_id = any(array("
        " select cmd_id from s2s.commands where cmd_id = any(%s::bigint[]) for update skip locked))",
        (list(cmd_ids),),
    )
    written = txn.rowcount
    if not written:
        still_there(txn, "update", "s2s.commands", "cmd_id", cmd_ids, f"finished_at > {_SOON}")
    return written


def _write(
    txn: Cursor,
    verb: kept_rows.Verb,
    table: str,
    keys: Sequence[K],
    write: Callable[[Cursor, Sequence[K]], int],
) -> int:
    """Write the rows of a step. Rows that the database refuses stay, and the first refusal is reported to the operator.

    :param keys: the keys of locked rows.
    :param write: writes the given rows and returns how many it has written.
    :returns: how many rows were written.
    """
    if not keys:
        return 0
    txn.execute("set constraints all immediate")
    try:
        with refusable(txn):
            return write(txn, keys)
    except (StatementRefused, *HELD):
        outcomes = list(singly(txn, keys, lambda key: write(txn, [key])))
    errors = [outcome for outcome in outcomes if isinstance(outcome, DatabaseError)]
    if errors:
        guards = kept_rows.described([each for each in kept_rows.guards(txn, [table]) if verb in each.verbs])
        text = f"old rows stay ({verb} on {table}): {errors[0]}{f'; see {guards}' if guards else ''}"
        kept = cast("PlanningConnection", txn.connection).kept
        kept.append(StatementRefused(text, getattr(errors[0], "constraint", None), kept_rows.STATE))
    return sum(outcome for outcome in outcomes if not isinstance(outcome, DatabaseError))


def note_keys(txn: Cursor, removed: Sequence[tuple[Any, ...]]) -> None:
    """Report keys without an expiry whose commands are removed to the operator: they would stay for ever.

    :param removed: the rows that :data:`REMOVE` returned.
    """
    unset = [idem_key for _, _, idem_key, is_set in removed if not is_set]
    still_there(txn, "update", "s2s.idempotency_keys", "idem_key", unset, "expires_at is null")


def sweep_keys(txn: Cursor, since: str = "-infinity") -> tuple[int, str | None]:
    """Remove expired keys.

    :param since: the expiry where the previous step ended, so that the rows that it removed are not read again.
    :returns: how many keys were removed, and where the next step begins; ``None``: there are no more.
    """
    txn.execute(
        "select idem_key, expires_at::text, (expires_at + interval '1 microsecond')::text"  # noqa: S608 - a constant
        f" from s2s.idempotency_keys where expires_at between %s::timestamptz and {_NOW}"
        " order by expires_at limit %s for update skip locked",
        (since, STEP_ROWS),
    )
    expired = txn.fetchall()
    removed = _write(txn, "delete", "s2s.idempotency_keys", [idem_key for idem_key, *_ in expired], _remove_keys)
    if len(expired) < STEP_ROWS:
        return removed, None
    # If no key could be removed, start after this expiry: the next step would find the same keys.
    return removed, expired[-1][1] if removed else expired[-1][2]


def _remove_keys(txn: Cursor, idem_keys: Sequence[str]) -> int:
    txn.execute("delete from s2s.idempotency_keys where idem_key = any(%s)", (list(idem_keys),))
    return _removed(txn, "s2s.idempotency_keys", len(idem_keys))


def _removed(txn: Cursor, table: str, expected: int) -> int:
    """Return how many rows the last statement removed, and note for the operator if fewer than expected."""
    removed = txn.rowcount
    if removed < expected:
        note(txn, "delete", table)
    return removed


def sweep_steering(txn: Cursor, after: int = 0) -> tuple[int, int | None]:
    """Remove the old control requests among the next ones in the order of their ids.

    :param after: the ``request_id`` where the previous step ended; 0 at first.
    :returns: how many were removed, and where the next step begins; ``None``: the following ones are too young.
    """
    txn.execute(
        "select request_id, created_at <= least_at, created_at > soon, created_at > looked_at from s2s.steering,"  # noqa: S608
        f" lateral (select {_NOW} - case when type = %s then {_HEALTH_KEPT} else make_interval(days => %s) end,"
        f" {_SOON}, {_NOW} - {_HEALTH_KEPT}) t (least_at, soon, looked_at)"
        " where request_id > %s order by request_id limit %s",
        (HEALTH_CHECK, STEERING_DAYS, after, STEP_ROWS),
    )
    page = txn.fetchall()
    _write(txn, "update", "s2s.steering", [each for each, _, is_ahead, _ in page if is_ahead], _redate_requests)
    old = [each for each, is_old, *_ in page if is_old]
    txn.execute(
        "select request_id from s2s.steering where request_id = any(%s::bigint[]) for update skip locked", (old,)
    )
    removed = _write(txn, "delete", "s2s.steering", [each for (each,) in txn.fetchall()], _remove_requests)
    is_last = len(page) < STEP_ROWS or all(is_young and not is_ahead for *_, is_ahead, is_young in page)
    return removed, None if is_last else page[-1][0]


def _redate_requests(txn: Cursor, request_ids: Sequence[int]) -> int:
    txn.execute(
        "update s2s.steering set created_at = now() where request_id = any(array("
        " select request_id from s2s.steering where request_id = any(%s::bigint[]) for update skip locked))",
        (list(request_ids),),
    )
    return txn.rowcount


def _remove_requests(txn: Cursor, request_ids: Sequence[int]) -> int:
    txn.execute("delete from s2s.steering where request_id = any(%s::bigint[])", (list(request_ids),))
    return _removed(txn, "s2s.steering", len(request_ids))
