"""Find old snapshots that keep dead rows, and commands of types that this server does not serve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from s2s.store.driver import Cursor
from s2s.store.tables.lookback import Lookback

#: Seconds that a command must have been due before its type is checked: a server that is starting may serve it.
WAITING_S: Final = 60
#: The most snapshot holders that are read, those of the oldest snapshots first.
_MOST_HOLDERS: Final = 100

# Any role can see the xmin of every session, but not its xact_start or its backend_type. A session of a user without a
# database is a replication, whose xmin is that of a query on the standby (hot_standby_feedback). A running vacuum does
# not delay another one. A logical slot's catalog_xmin only keeps rows of the catalogs.
_HOLDERS: Final = """
select kind, name, owner, application, extract(epoch from clock_timestamp() - since)::float8, xid
from (
    select case when datname is null and usename is not null then 'standby' else 'session' end,
        pid::text, usename::text, application_name, xact_start, coalesce(backend_xid, backend_xmin)::text,
        greatest(age(backend_xid), age(backend_xmin))
    from pg_stat_activity
    where (datname = current_database() or datname is null) and coalesce(backend_xid, backend_xmin) is not null
        and pid <> pg_backend_pid() and pid not in (select pid from pg_stat_progress_vacuum)
    union all
    select 'slot', slot_name::text, null, null, null, xmin::text, age(xmin)
    from pg_replication_slots where xmin is not null
    union all
    select 'prepared', gid, owner::text, null, prepared, transaction::text, age(transaction)
    from pg_prepared_xacts where database = current_database()
) h (kind, name, owner, application, since, xid, age)
order by age desc limit %s
"""
_DEAD: Final = (
    "select coalesce(sum(n_dead_tup), 0)::bigint from pg_stat_user_tables"
    " where schemaname = 's2s' and relname in ('commands', 'outbox', 'batch_notes', 'idempotency_keys')"
)
_UNSERVED: Final = (
    "select cmd_id from s2s.commands where status = 'ready' and due_at <= now() - %(waiting_s)s * interval '1 second'"
    " and cmd_type <> all(string_to_array(%(types)s, E'\\n')) limit 1"
)


@dataclass(frozen=True)
class Holder:
    """A session, standby, slot or prepared transaction that holds a snapshot.

    :param kind: ``session``, ``standby`` (the session that sends to it), ``slot`` or ``prepared``.
    :param name: a pid, the slot's name, or the gid.
    :param age_s: seconds since its transaction began; ``None``: the database does not report it.
    :param xid: the transaction id that it holds, by which a later check recognises it.
    """

    kind: str
    name: str
    owner: str | None
    application: str | None
    age_s: float | None
    xid: str

    @property
    def described(self) -> str:
        """A description for operators, without the query's text, which may contain a secret."""
        pid = f"pid {self.name}"
        words = {
            "session": pid,
            "standby": f"a query on the standby of {pid}",
            "slot": f"replication slot {self.name!r}",
        }
        owner = f" of user {self.owner!r}" if self.owner else ""
        application = f", application_name {self.application!r}" if self.application else ""
        return words.get(self.kind, f"prepared transaction {self.name[:200]!r}") + owner + application

    @property
    def cure(self) -> str:
        """How an operator can end it."""
        return {
            "session": f"let it end, or: select pg_terminate_backend({self.name})",
            "standby": "end the query there, or set hot_standby_feedback = off there",
            "slot": "let its standby catch up, or drop the slot: select pg_drop_replication_slot(...)",
        }.get(self.kind, "end it: commit prepared or rollback prepared")


def holders(txn: Cursor) -> tuple[list[Holder], int]:
    """Return the holders of snapshots, the oldest first, and the number of dead rows in our busy tables."""
    txn.execute(_HOLDERS, (_MOST_HOLDERS,))
    found = [Holder(*row) for row in txn]
    txn.execute(_DEAD)
    return found, int((txn.fetchone() or (0,))[0])


def unserved(txn: Cursor, lookback: Lookback, types: Iterable[str]) -> str | None:
    """Return the type of a command that has been due for a while and is of none of these types.

    :param lookback: limits the time that this takes, because it may read every waiting command.
    """
    txn.execute("set local enable_seqscan = off")
    lookback.look(txn, _UNSERVED, {"types": "\n".join(types), "waiting_s": WAITING_S})
    txn.execute("select cmd_type from s2s.commands where cmd_id = %s", (next(iter(lookback.behind), None),))
    row = txn.fetchone()
    return row[0] if row else None
