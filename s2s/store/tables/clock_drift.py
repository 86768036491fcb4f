"""Times that lie further ahead than they can rightly be (docs/protocol.rst, "Clocks").

The database's clock dates the rows. If it is ahead for a while, the rows of that while wait until it gets there again;
if it is behind, every row waits. No rule here needs to know that this happened: each row that s2s itself dates has a
longest wait, and a time beyond it is pulled back. A ``due_at`` that a user gave has none, and stays. Only while the
clock is behind, each time that is right lies far ahead: then what is in :data:`NOT_WHILE_BEHIND` stays too.
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

#: Seconds that a time may lie further ahead than its longest wait: a clock is corrected by less than that all the time.
SLACK_S: Final = 60
#: Rows that one statement looks at or changes, at most.
STEP_ROWS: Final = 1000
#: The longest that the outbox waits, in seconds: a server may ask for so long a pause, and a lease is shorter.
_OUTBOX_S: Final = 60

_SOON: Final = f"now() + interval '{SLACK_S} seconds'"
_PAUSED: Final = f"now() + interval '{MAX_BACKOFF_S + SLACK_S} seconds'"

# What was done is past: a key that was made is active, and one that was closed ends, by whatever clock. They keep their
# order, by which the newest signs where there is no default.
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
    """Give the rule for the jobs of one kind of schedule.

    By whole periods, so that it is a time of the schedule still. A run that is begun keeps its time, which its key has.

    :param prefix: what such a schedule begins with.
    :param period: an interval, in SQL; null: somebody has written what is no schedule, and ``due_at`` stays.
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


# Whatever sets another time of an open order sets stepped_at too, which has an index. They keep their order.
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

# What an operator was told did not happen must not happen later, so a request is not sent, but over.
_STEERING: Final = f"update s2s.steering set expires_at = now() where taken_by is null and expires_at > {_SOON}"  # noqa: S608
_LINKS: Final = f"update s2s.engine_links set seen_at = now() where seen_at > {_SOON}"  # noqa: S608
_NOTES: Final = f"update s2s.batch_notes set noted_at = now() where noted_at > {_SOON}"  # noqa: S608
# A time that was counted in days from then; one that was written out stays.
_TOKENS: Final = f"""
update s2s.api_tokens set created_at = now(), expires_at = expires_at - case
    when expires_at - created_at = date_trunc('day', expires_at - created_at) then created_at - now()
    else interval '0' end
where created_at > {_SOON}
"""  # noqa: S608

#: What each role keeps right, by what it is called in the log. Each statement costs a few rows of an index, or of a
#: table that is small.
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


#: What is not pulled back while the clock may be behind: of a life that is counted from then the rest would be lost for
#: good, and a daily job would run at another time of the day. All else is past, or to be done soon, and comes too early
#: at worst.
NOT_WHILE_BEHIND: Final = frozenset(("daily jobs", "tokens", "notices"))


def look(
    txn: Cursor, rules: Mapping[str, str], is_behind: Callable[[float], bool] = lambda _: False
) -> tuple[float, dict[str, int], dict[str, DatabaseError]]:
    """Read the database's clock, and pull back what lies too far ahead.

    :param is_behind: whether a time that the database says may be behind: then :data:`NOT_WHILE_BEHIND` holds.
    :returns: Unix seconds, and the rows that were changed by what they are called; :data:`STEP_ROWS` of one kind:
        there may be more. And why rows were not changed, as by a trigger that refuses one of them.
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


#: ``due_at`` was set by s2s: by the push, which gave none, by a charge, or by a retry.
_IS_AHEAD: Final = f"(due_at = created_at or ((attempts > 0 or due_is_ours) and due_at > {_PAUSED}))"


def heal_commands(txn: Cursor, after: Any = None) -> tuple[int, Any]:
    """Pull back the commands that nobody wanted later, among the next ones that are due later.

    :param after: where the step before ended; ``None``: at the beginning.
    :returns: how many were pulled back, and where the next step begins; ``None``: these were the last ones.
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
        # No time beyond the driver's own: such a one is a user's.
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
    """Let the newest notices live as long as they were meant to; see :func:`heal_commands`.

    :param before: where the step before ended; the newest first, up to a step that finds nothing.
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


#: What a server looks through in steps, by what it is called in the log.
SERVER_STEPS: Final = {"commands": heal_commands, "notices": heal_notices}
