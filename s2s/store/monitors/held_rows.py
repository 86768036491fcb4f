"""Find locks of other programs, and locks that a handler holds for long.

Such a lock is on a due row, which the polling queries skip, or a session of s2s waits for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from s2s.store.driver import Cursor
from s2s.store.lock_wait import HOLDER, describe_holder

#: Seconds that a row must have been due, and that the transaction of its holder must have lasted.
WAITING_S: Final = 30
#: The statement_timeout of each query of :func:`look`, in milliseconds.
_LOOK_MS: Final = 1000
#: The numbers of rows of one table that are checked, and of holders that are named.
_MOST_ROWS: Final = 100
_MOST_HOLDERS: Final = 5

_BEFORE: Final = "now() - %(waiting_s)s * interval '1 second'"
#: The key of each table, and the condition for its due rows.
_DUE: Final = {
    "s2s.commands": (
        "cmd_id",
        f"status = 'ready' and due_at <= {_BEFORE} and cmd_id not in (select unnest(cmd_ids) from s2s.batch_notes)",  # noqa: S608
    ),
    "s2s.jobs": ("job_type", f"due_at <= {_BEFORE} and coalesce(retry_at, due_at) <= {_BEFORE}"),
    "s2s.orders": ("order_id", f"status in ('queued', 'running') and coalesce(retry_at, stepped_at) <= {_BEFORE}"),
    "s2s.outbox": ("outbox_id", f"state = 'waiting' and send_at <= {_BEFORE}"),
    "s2s.broadcasts": ("broadcast_id", f"state = 'pending' and created_at <= {_BEFORE}"),
}
#: The tables that each role works on.
TABLES: Final = {"server": ("s2s.commands",), "engine": ("s2s.jobs", "s2s.orders", "s2s.outbox", "s2s.broadcasts")}

#: A session of s2s is named only if its transaction is older than this, in seconds. The work of s2s itself takes less;
#: the work of a handler, a job or an order may take longer.
YOUNG_S: Final = 10
_IS_FOREIGN: Final = "coalesce(session.application_name, '') not like 's2s-%%'"
#: A session of s2s that waits for a lock itself is only ahead of the other one in the queue, so it is left out.
_IS_OLD: Final = (
    "session.xact_start < now() - %(young_s)s * interval '1 second' and session.wait_event_type is distinct from 'Lock'"
)
#: Seconds for which a statement of s2s must have waited for a lock before the wait is logged.
_WAITS_S: Final = 3
# A session with a row lock also has a lock on the table. The pid of a prepared transaction is null. A session of s2s
# locks the row of a job or an order for as long as the job or order runs.
_HOLDERS: Final = f"""
select t.name, coalesce(l.pid, 0), {HOLDER}
from unnest(%(tables)s::text[]) t (name)
join pg_locks l on l.locktype = 'relation' and l.granted and l.relation = to_regclass(t.name)
    and l.database = (select oid from pg_database where datname = current_database())
left join pg_stat_activity session using (pid)
where l.mode in ('RowShareLock', 'RowExclusiveLock') and l.pid is distinct from pg_backend_pid()
    and ({_IS_FOREIGN} or {_IS_OLD} and t.name not in ('s2s.jobs', 's2s.orders'))
    and coalesce(session.xact_start, '-infinity') < {_BEFORE}
order by session.xact_start
"""  # noqa: S608 - of constants, as below


# Every lock counts here, since any user of the database may take the advisory lock for which a statement of s2s waits.
_AWAITED: Final = f"""
select w.pid, blocker.pid, {HOLDER}
from pg_stat_activity w cross join unnest(pg_blocking_pids(w.pid)) blocker (pid)
left join pg_stat_activity session on session.pid = blocker.pid
where w.datname = current_database() and w.application_name like 's2s-%%' and w.wait_event_type = 'Lock'
    and w.query_start < now() - %(waits_s)s * interval '1 second'
    and ({_IS_FOREIGN} or {_IS_OLD})
order by session.xact_start
"""  # noqa: S608


@dataclass(frozen=True)
class Held:
    """The effect of locks of other sessions: locked rows, or waiting sessions of s2s.

    :param subject: the rows or sessions and their state, as the text that follows their number.
    :param keys: the keys of the rows, or the pids of the waiting sessions.
    :param holders: the sessions that may hold the locks, by pid; 0: a prepared transaction.
    """

    subject: str
    keys: frozenset[Any]
    holders: Mapping[int, str]

    def both(self, other: Held) -> Held:
        """Return the part that another finding for the same subject contains as well."""
        holders = {pid: text for pid, text in self.holders.items() if pid in other.holders}
        return Held(self.subject, self.keys & other.keys, holders)

    def __bool__(self) -> bool:
        return bool(self.keys and self.holders)

    def __str__(self) -> str:
        named = "; ".join(list(self.holders.values())[:_MOST_HOLDERS])
        return f"{len(self.keys)} {self.subject}: {named}"


def look(
    txn: Cursor, tables: Collection[str], waiting_s: float = WAITING_S, waits_s: float = _WAITS_S
) -> dict[str, Held]:
    """Find due rows that other sessions have locked for long, and sessions of s2s that wait for other sessions.

    A table is read only if some session may hold such locks on it. The result may contain a row that a session of s2s
    has locked only for this moment: a second call tells such a row from one that is locked for long.

    :param waiting_s: seconds that a row must have been due, and that the transaction of its holder must have lasted.
    :param waits_s: seconds that a session of s2s must have waited.
    :returns: the findings by their subject.
    """
    txn.execute(f"set local statement_timeout = {_LOOK_MS}")
    txn.execute(_HOLDERS, {"tables": list(tables), "waiting_s": waiting_s, "young_s": YOUNG_S})
    holders: dict[str, dict[int, str]] = {}
    for table, *holder in txn.fetchall():
        holders.setdefault(table, {})[holder[0]] = describe_holder(*holder)
    found = [
        Held(f"rows of {table} are due and locked by another session", _locked(txn, table, waiting_s), pids)
        for table, pids in holders.items()
    ]
    txn.execute(_AWAITED, {"waits_s": waits_s, "young_s": YOUNG_S})
    awaited = txn.fetchall()
    found.append(
        Held(
            "sessions of s2s wait for locks of another session",
            frozenset(row[0] for row in awaited),
            {row[1]: describe_holder(*row[1:]) for row in awaited},
        )
    )
    return {held.subject: held for held in found if held}


def _locked(txn: Cursor, table: str, waiting_s: float) -> frozenset[Any]:
    key, due = _DUE[table]
    txn.execute(f"select {key} from {table} where {due} limit {_MOST_ROWS}", {"waiting_s": waiting_s})  # noqa: S608
    keys = {each for (each,) in txn.fetchall()}
    if not keys:
        return frozenset()
    params = {"keys": list(keys), "waiting_s": waiting_s}
    txn.execute(f"select {key} from {table} where {key} = any(%(keys)s) for update skip locked", params)  # noqa: S608
    free = {each for (each,) in txn.fetchall()}
    # Rows that were completed meanwhile are left out.
    txn.execute(f"select {key} from {table} where {key} = any(%(keys)s) and {due}", params)  # noqa: S608
    return frozenset(each for (each,) in txn.fetchall() if each not in free)
