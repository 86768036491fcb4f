"""The queue of notifications, one for all databases of a PostgreSQL: when it is full, every NOTIFY is refused.

A session that listens and stays in a transaction keeps all that came since. When it is gone the queue is still full,
until somebody asks how full it is: that moves its tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from s2s.errors import DatabaseUnavailable, harmless
from s2s.store.driver import Cursor

#: Shares of the queue: from the first on it is told, and from the second on it counts as full.
HIGH: Final = 0.5
FULL: Final = 0.98

# Nobody sees who listens. A role without pg_read_all_stats sees the transactions of its own sessions alone. A young
# transaction keeps nothing for long.
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
    """How full it is.

    :param usage: from 0 to 1.
    :param oldest: the session with the oldest transaction, in words; empty: none is seen.
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
    """Look how full it is, which frees what nobody waits for any more."""
    txn.execute(_LOOK, (HIGH,))
    ((usage, pid, application, state, open_s),) = txn.fetchall()
    if pid is None:
        return Queue(usage)
    name = f"application_name {harmless(application)!r}" if application else "no application_name"
    oldest = f"the oldest one is pid {pid} ({name}, {state}, for {open_s} s): select pg_terminate_backend({pid})"
    return Queue(usage, oldest)


def check(txn: Cursor) -> None:
    """Refuse a queue that is full.

    :raises DatabaseUnavailable: it names the cure.
    """
    queue = look(txn)
    if queue.usage >= FULL:
        raise DatabaseUnavailable(str(queue))
