"""The NOTIFY queue, one for all databases of a PostgreSQL server: when it is full, every NOTIFY is refused.

A listening session in an open transaction retains all later notifications. After the session is gone the queue stays
full until a session asks for its usage, which advances the tail of the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from s2s.errors import DatabaseUnavailable, harmless
from s2s.store.driver import Cursor

#: Shares of the queue in use: from HIGH on it is reported with the oldest session, and from FULL on it counts as full.
HIGH: Final = 0.5
FULL: Final = 0.98

# No view shows which sessions listen. A role without pg_read_all_stats sees only the transactions of its own sessions.
# Transactions younger than one second are left out: they retain notifications only briefly.
_LOOK: Final = """
select queue.usage, session.pid, session.application_name, session.state,
    extract(epoch from clock_timestamp() - session.xact_start)::bigint
from (select pg_notification_queue_usage() as usage) queue left join lateral (
    select * from pg_stat_activity where xact_start < clock_timestamp() - interval '1 second'
    and backend_type = 'client backend' and pid <> pg_backend_pid()
    order by state like 'idle in transaction%%' desc, xact_start limit 1
) session on queue.usage >= %s
"""


@dataclass(frozen=True)
class Queue:
    """The usage of the NOTIFY queue.

    :param usage: the share in use, from 0 to 1.
    :param oldest: a description of the session with the oldest transaction; empty: no such session is visible.
    """

    usage: float
    oldest: str = ""

    def __str__(self) -> str:
        return (
            f"the NOTIFY queue of PostgreSQL is {self.usage:.0%} full, and once it is full each NOTIFY is refused:"
            " end the session that listens in a long transaction:"
            f" {self.oldest or 'see pg_stat_activity as a superuser'}"
        )


def look(txn: Cursor) -> Queue:
    """Return the usage of the queue. Reading the usage also frees notifications that no session waits for any more."""
    txn.execute(_LOOK, (HIGH,))
    ((usage, pid, application, state, open_s),) = txn.fetchall()
    if pid is None:
        return Queue(usage)
    name = f"application_name {harmless(application)!r}" if application else "no application_name"
    oldest = f"the oldest one is pid {pid} ({name}, {state}, for {open_s} s): select pg_terminate_backend({pid})"
    return Queue(usage, oldest)


def check(txn: Cursor) -> None:
    """Raise an error if the queue is full.

    :raises DatabaseUnavailable: the queue is full; the text names the cure.
    """
    queue = look(txn)
    if queue.usage >= FULL:
        raise DatabaseUnavailable(str(queue))
