"""Pull back times that lie further ahead than they validly can (docs/protocol.rst, "Clocks").

The database's clock dates the rows. If the clock runs ahead for a while, the rows dated in that while wait until real
time catches up. If the clock is behind, every row waits. The rules here need not know that the clock was wrong: each
time that s2s itself writes has a longest wait, and a rule pulls back a time beyond it. A ``due_at`` that a user set has
no longest wait, and no rule changes it. While the clock is behind, correct times also lie far ahead, so the rules in
:data:`NOT_WHILE_BEHIND` do not run then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

import psycopg2

from s2s.errors import DatabaseError
from s2s.store import sqlstate
from s2s.store.driver import Cursor, array_literal, is_in_transaction, savepoint, translate_error
from s2s.store.kept_rows import still_there
from s2s.store.tables.commands import MAX_BACKOFF_S

#: Seconds that a time may lie beyond its longest wait before it is pulled back: routine clock corrections are smaller.
SLACK_S: Final = 60
#: The most rows that one statement reads or changes.
STEP_ROWS: Final = 1000
#: The longest wait of an outbox row, in seconds: a server may ask for a pause of this length, and a lease is shorter.
_OUTBOX_S: Final = 60

_SOON: Final = f"now() + interval '{SLACK_S} seconds'"
_PAUSED: Final = f"now() + interval '{MAX_BACKOFF_S + SLACK_S} seconds'"

# Making and closing a key are past events: a key that was made is active, and a key that was closed ends, whatever the
# clock says. The keys keep their order, because the newest key signs where there is no default.
KEYS: Final = f"""
update s2s.s2s_keys k set
    active_from = case when active_from = created_at then least(active_from, b.made_at) else active_from end,
    created_at = least(created_at, b.made_at),
    active_to = active_to - greatest(closed_at - now(), interval '0'),
    closed_at = least(closed_at, now())
from (
    select key_id,
        now() - row_number() over (order by created_at desc, key_id desc) * interval '1 microsecond' as made_at
    from s2s.s2s_keys where created_at > {_SOON} or closed_at > {_SOON}
) b
where k.key_id = b.key_id
"""  # noqa: S608 - of constants, as below


def _jobs(prefix: str, period: str) -> str:
    """Return the SQL rule for the jobs of one kind of schedule.

    The rule moves ``due_at`` by whole periods, so that it remains a time of the schedule. A run that has begun keeps
    its ``due_at``, because the run's key contains it.

    :param prefix: the prefix of the schedules of this kind.
    :param period: an interval, in SQL. Null: the column holds no valid schedule, and ``due_at`` stays.
    """
    far = f"(state is null and attempts = 0 and due_at > {_SOON} + p.period)"
    return f"""
update s2s.jobs j set
    due_at = case when b.is_far then j.due_at - b.period
        * (ceil(extract(epoch from j.due_at - now()) / extract(epoch from b.period)) - 1) else j.due_at end,
    retry_at = case when j.retry_at > {_PAUSED} then now() else j.retry_at end
from (
    select job_type, p.period, {far} as is_far
    from s2s.jobs cross join lateral (select {period} as period) p
    where schedule like '{prefix}%' and ({far} or retry_at > {_PAUSED})
    for update of jobs skip locked
) b
where j.job_type = b.job_type
"""  # noqa: S608


# Every statement that sets another time of an open order also sets stepped_at, which has an index. The orders keep
# their order.
_ORDERS: Final = f"""
update s2s.orders o set stepped_at = now() + b.place * interval '1 microsecond', retry_at = least(o.retry_at, now()),
    created_at = case o.status when 'queued' then least(o.created_at, now()) else o.created_at end
from (
    select order_id, row_number() over (order by stepped_at, order_id) as place from (
        select order_id, stepped_at from s2s.orders where status in ('queued', 'running') and stepped_at > {_SOON}
        order by stepped_at limit {STEP_ROWS} for update skip locked
    ) ahead
) b
where o.order_id = b.order_id
"""  # noqa: S608

_OUTBOX: Final = f"""
update s2s.outbox set send_at = now() where outbox_id = any(array(
    select outbox_id from s2s.outbox
    where state = 'waiting' and send_at > now() + interval '{_OUTBOX_S + SLACK_S} seconds'
    order by send_at limit {STEP_ROWS} for update skip locked
))
"""  # noqa: S608

# The operator was told that the request did not happen, so it must not happen later: the request expires and is not
# sent.
_STEERING: Final = f"update s2s.steering set expires_at = now() where taken_by is null and expires_at > {_SOON}"  # noqa: S608
_LINKS: Final = f"update s2s.engine_links set seen_at = now() where seen_at > {_SOON}"  # noqa: S608
_NOTES: Final = f"update s2s.batch_notes set noted_at = now() where noted_at > {_SOON}"  # noqa: S608
# An expiry that was given in days moves with created_at. An expiry that was given as a date stays.
_TOKENS: Final = f"""
update s2s.api_tokens set created_at = now(), expires_at = expires_at - case
    when expires_at - created_at = date_trunc('day', expires_at - created_at) then created_at - now()
    else interval '0' end
where created_at > {_SOON}
"""  # noqa: S608

#: The rules that each role runs, by their names in the log. Each statement reads a few rows of an index, or a small
#: table.
ENGINE_RULES: Final = {
    "jobs": _jobs("every:", "interval '1 second' * substring(schedule from '^every:([1-9][0-9]{0,4})s$')::integer"),
    "daily jobs": _jobs("daily@", "interval '1 day'"),
    "orders": _ORDERS,
    "rows of the outbox": _OUTBOX,
    "keys": KEYS,
}
SERVER_RULES: Final = {
    "orders": _ORDERS,
    "keys": KEYS,
    "tokens": _TOKENS,
    "control requests": _STEERING,
    "links": _LINKS,
    "notes of batches": _NOTES,
}


#: The rules that do not run while the clock may be behind. A lifetime counted from a pulled-back time would lose its
#: rest for good, and a daily job would run at another time of the day. The other rules change times that are past or
#: due soon, so a wrong change at worst makes a row due too early.
NOT_WHILE_BEHIND: Final = frozenset(("daily jobs", "tokens", "notices"))


def look(
    txn: Cursor, rules: Mapping[str, str], is_behind: Callable[[float], bool] = lambda _: False
) -> tuple[float, dict[str, int], dict[str, DatabaseError]]:
    """Read the database's clock, and pull back the times that lie too far ahead.

    :param is_behind: whether the clock may be behind, given its time in Unix seconds. If so, the rules of
        :data:`NOT_WHILE_BEHIND` do not run.
    :returns: the database's time in Unix seconds; the number of changed rows by rule name (a count of :data:`STEP_ROWS`
        means that there may be more); and, by rule name, the error of each rule that failed, such as a trigger that
        refuses one of its rows.
    """
    txn.execute("select extract(epoch from clock_timestamp())::float8")
    [(at,)] = txn.fetchall()
    if is_behind(at):
        rules = {name: rules[name] for name in rules if name not in NOT_WHILE_BEHIND}
    healed, refused = {}, {}
    for name, statement in rules.items():
        try:
            with savepoint(txn):
                txn.execute(statement)
                count = txn.rowcount
        except psycopg2.Error as error:
            if sqlstate.of(error).drops or not is_in_transaction(txn):
                raise
            refused[name] = translate_error(error, txn.connection)
        else:
            healed.update({name: count} if count else {})
    return at, healed, refused


#: Whether s2s set ``due_at``: at a push without ``due_at``, at a failed attempt, or at a retry.
_IS_AHEAD: Final = f"(due_at = created_at or ((attempts > 0 or due_is_ours) and due_at > {_PAUSED}))"


def heal_commands(txn: Cursor, after: Any = None) -> tuple[int, Any]:
    """Pull back commands whose late ``due_at`` no user set, among the next commands that are not due yet.

    :param after: where the previous step ended; ``None``: start at the beginning.
    :returns: how many commands were pulled back, and where the next step begins; ``None``: there are no more.
    """
    priority: int
    due_at: datetime | None
    priority, due_at, cmd_id = after or (-1, None, 0)
    ahead: list[int] = []
    seen = 0
    while seen < STEP_ROWS:
        if due_at is None:
            txn.execute("select min(priority) from s2s.commands where status = 'ready' and priority > %s", (priority,))
            [(found,)] = txn.fetchall()
            if found is None:
                return _pull_back(txn, ahead), None
            priority = found
        # Skip times that the driver cannot represent: only a user sets such a time.
        txn.execute(
            f"select cmd_id, due_at, {_IS_AHEAD} from s2s.commands where status = 'ready' and priority = %s"  # noqa: S608
            f" and (due_at, cmd_id) > (coalesce(%s, {_SOON}), %s) and due_at < '9999-01-01'"
            " order by due_at, cmd_id limit %s",
            (priority, due_at, cmd_id, STEP_ROWS - seen),
        )
        page = txn.fetchall()
        ahead += [number for number, _, is_ahead in page if is_ahead]
        seen += len(page)
        cmd_id, due_at = (page[-1][0], page[-1][1]) if seen == STEP_ROWS else (0, None)
    return _pull_back(txn, ahead), (priority, due_at, cmd_id)


def _pull_back(txn: Cursor, cmd_ids: list[int]) -> int:
    if not cmd_ids:
        return 0
    txn.execute(
        "update s2s.commands set due_at = now(), due_is_ours = true, created_at = least(created_at, now())"  # noqa: S608
        " where cmd_id = any(array(select cmd_id from s2s.commands where cmd_id = any(%s::bigint[]) and"
        " status = 'ready'"
        f" and {_IS_AHEAD} for update skip locked))",
        (array_literal(cmd_ids),),
    )
    healed = txn.rowcount
    if not healed:
        still_there(txn, "update", "s2s.commands", "cmd_id", cmd_ids, f"status = 'ready' and {_IS_AHEAD}")
    return healed


def heal_notices(txn: Cursor, before: Any = None) -> tuple[int, Any]:
    """Restore the intended lifetime of the newest notices; see :func:`heal_commands`.

    :param before: where the previous step ended. The steps go from the newest notice down, until a step finds nothing.
    """
    txn.execute(
        f"select notice_id, created_at > {_SOON} from s2s.notices where %(before)s::bigint is null"  # noqa: S608
        " or notice_id < %(before)s::bigint order by notice_id desc limit %(limit)s",
        {"before": before, "limit": STEP_ROWS},
    )
    page = txn.fetchall()
    ahead = [notice_id for notice_id, is_ahead in page if is_ahead]
    if not ahead:
        return 0, None
    txn.execute(
        "update s2s.notices set created_at = now(), expires_at = expires_at - (created_at - now())"
        " where notice_id = any(%s::bigint[])",
        (array_literal(ahead),),
    )
    healed = txn.rowcount
    if healed < len(ahead):
        still_there(txn, "update", "s2s.notices", "notice_id", ahead, f"created_at > {_SOON}")
    return healed, page[-1][0] if len(page) == STEP_ROWS else None


#: The tables that a server checks in steps, by their names in the log.
SERVER_STEPS: Final = {"commands": heal_commands, "notices": heal_notices}
