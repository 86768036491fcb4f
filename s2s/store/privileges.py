"""What the user of the database needs to see, write and make, and the statements that give what it lacks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import psycopg2

from s2s.errors import OperatorError
from s2s.store import migrations
from s2s.store.driver import Cursor, is_broken

_ALL: Final = ("select", "insert", "update", "delete")
#: Tables of which we need less. The audit is append-only; only the migration writes its own table.
_FEWER: Final = {"audit": ("select", "insert"), "s2s_migrations": ("select",)}
#: Statements that a one-line error shows. ``s2s db status`` shows all of them.
_SHOWN: Final = 3

#: Our tables that there are, their schemas, their sequences, and our functions; each with what is needed and missing.
_MISSING: Final = """
with ours as (
    select n.privilege, c.oid, c.oid::regclass::text as name, c.relnamespace
    from unnest(%s::text[], %s::text[]) as n (name, privilege) join pg_catalog.pg_class c on c.oid = to_regclass(n.name)
)
select 'schema', relnamespace::regnamespace::text, 'usage' from ours
where not has_schema_privilege(relnamespace, 'usage')
union
select 'table', name, privilege from ours where not has_table_privilege(oid, privilege)
union
select 'sequence', s.oid::regclass::text, 'usage'
from ours join pg_catalog.pg_depend d on d.refobjid = ours.oid and d.deptype in ('a', 'i')
join pg_catalog.pg_class s on s.oid = d.objid
where case when s.relkind = 'S' then not has_sequence_privilege(s.oid, 'usage') end
union
select 'function', p.oid::regprocedure::text, 'execute'
from pg_catalog.pg_proc p where p.proname like 's2s\\_%%' and p.pronamespace in (select relnamespace from ours)
and not has_function_privilege(p.oid, 'execute')
order by 1, 2, 3
"""
#: Our tables of which row level security may hide rows from this user: one policy that lets all through hides none.
_HIDDEN: Final = """
select c.oid::regclass::text, quote_ident(current_user)
from unnest(%s::text[]) as n (name) join pg_catalog.pg_class c on c.oid = to_regclass(n.name)
where row_security_active(c.oid) and (
    exists (select from pg_catalog.pg_policy p where p.polrelid = c.oid and not p.polpermissive)
    or not exists (
        select from pg_catalog.pg_policy p where p.polrelid = c.oid and p.polcmd = '*'
        and pg_get_expr(p.polqual, c.oid) = 'true' and coalesce(pg_get_expr(p.polwithcheck, c.oid), 'true') = 'true'
        and exists (select from unnest(p.polroles) as r (role)
            where case r.role when 0 then true else pg_has_role(r.role, 'usage') end)
    )
)
order by 1
"""
#: The schema in which a migration makes its tables, and an owner of tables of ours in whose name this user may not act.
#: The schema of temporary tables comes last, and is none for ours.
_TO_MIGRATE: Final = """
select quote_ident(current_user), current_setting('search_path'),
    case when current_schema() !~ '^pg_temp_' then quote_ident(current_schema()) end,
    has_schema_privilege(current_schema(), 'create'),
    (select min(quote_ident(pg_get_userbyid(c.relowner)))
    from unnest(%s::text[]) as n (name) join pg_catalog.pg_class c on c.oid = to_regclass(n.name)
    where not pg_has_role(c.relowner, 'usage'))
"""


def missing(txn: Cursor) -> list[str]:
    """Return the statements that grant what the user of this connection lacks; none: it lacks nothing."""
    needed = [(name, each) for name in sorted(migrations.tables() | _FEWER.keys()) for each in _FEWER.get(name, _ALL)]
    txn.execute(_MISSING, ([name for name, _ in needed], [each for _, each in needed]))
    lacking: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, name, privilege in txn:
        lacking[kind, name].append(privilege)
    txn.execute("select quote_ident(current_user)")
    (user,) = txn.fetchone() or ("",)
    return [
        f"grant {', '.join(privileges)} on {kind} {name} to {user};" for (kind, name), privileges in lacking.items()
    ]


def hidden(txn: Cursor) -> list[str]:
    """Return a line for each table of which row level security hides rows from the user of this connection."""
    txn.execute(_HIDDEN, (sorted(migrations.tables() | _FEWER.keys()),))
    return [
        f"row level security hides rows of the table {table} from {user}: run as its owner:"
        f" alter table {table} disable row level security; or as a superuser: alter role {user} bypassrls;"
        for table, user in txn
    ]


def to_migrate(txn: Cursor) -> list[str]:
    """Return a line for each reason why the user of this connection cannot run the migrations that are missing."""
    if all(each.applied_at for each in migrations.status(txn)):
        return []
    txn.execute(_TO_MIGRATE, (sorted(migrations.tables() | _FEWER.keys()),))
    ((user, path, schema, may_create, owner),) = txn.fetchall()
    if schema is None:
        return [
            f"there is no schema of the search_path {path} that {user} may use: run as the owner of the database:"
            f" create schema if not exists public; grant usage, create on schema public to {user};"
            f" alter role {user} set search_path = public;"
        ]
    lines = []
    if not may_create:
        lines.append(
            "a privilege to migrate is missing, run as the owner of the database:"
            f" grant create on schema {schema} to {user};"
        )
    if owner is not None:
        lines.append(f"{user} may not change the tables of {owner}: run s2s db migrate as {owner}")
    return lines


def check(txn: Cursor) -> None:
    """Refuse a database whose user lacks a privilege, or does not see each row.

    :raises OperatorError: with the statements that mend it.
    """
    grants = missing(txn)
    if grants:
        shown = " ".join(grants[:_SHOWN])
        raise OperatorError(
            "the database user lacks privileges: run as the owner of the tables: " + shown + _more(grants, _SHOWN)
        )
    _refuse(hidden(txn))


@contextmanager
def explained(txn: Cursor) -> Iterator[None]:
    """Where a migration is refused, see whether it is its user who cannot do it.

    :raises OperatorError: with the statements that mend it.
    """
    try:
        yield
    except psycopg2.Error:
        if not is_broken(txn.connection):
            txn.connection.rollback()
            _refuse(hidden(txn) or to_migrate(txn))
        raise


def _refuse(lines: Sequence[str]) -> None:
    if lines:
        raise OperatorError(lines[0] + _more(lines, 1))


def _more(lines: Sequence[str], shown: int) -> str:
    return f" and {len(lines) - shown} more, which s2s db status lists" if len(lines) > shown else ""
