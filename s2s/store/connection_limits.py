"""The session limits of PostgreSQL: if a limit is below the need of a role, some of its work never gets a session."""

from __future__ import annotations

from typing import Final

from s2s.errors import OperatorError
from s2s.store.driver import Cursor

#: The limits of this session's role, database and server, with the statements that raise them. Only the limit of the
#: server applies to a superuser; -1 means no limit.
_LIMITS: Final = """
select limits.said, limits.most, 0, limits.cure
from pg_catalog.pg_roles r
join pg_catalog.pg_database d on d.datname = current_database(),
lateral (values
    (format('the role %I', rolname), rolconnlimit, format('alter role %I connection limit', rolname)),
    (format('the database %I', datname), datconnlimit, format('alter database %I connection limit', datname))
) as limits (said, most, cure)
where r.rolname = session_user and not r.rolsuper and limits.most >= 0
union all
select 'PostgreSQL', current_setting('max_connections')::int - reserved, reserved,
    'alter system set max_connections ='
from pg_catalog.pg_roles r,
lateral (values (case when r.rolsuper then 0 else
    current_setting('superuser_reserved_connections')::int
    + coalesce(current_setting('reserved_connections', true)::int, 0) end)) as kept (reserved)
where r.rolname = session_user
order by 2
"""


def check(txn: Cursor, sessions: int) -> None:
    """Refuse a database that allows fewer sessions than a process needs.

    :param sessions: the number of sessions that the process has when all of its work is under way.
    :raises OperatorError: with the statement that raises the limit.
    """
    txn.execute(_LIMITS)
    for said, most, reserved, cure in txn:
        if most < sessions:
            more = f", and {reserved} for superusers, and start PostgreSQL again" if "system" in cure else ""
            raise OperatorError(
                f"{said} allows {most} connections and this process needs {sessions}: "
                f"run: {cure} N; with an N of at least {sessions} for each process{more}"
            )
