"""The privileges that the database user needs, and the statements that grant the missing ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import psycopg2

from s2s.errors import OperatorError
from s2s.store import migrations
from s2s.store.driver import Cursor, is_broken
from s2s.store.migrations import Migrations

_ALL: Final = ("select", "insert", "update", "delete")
#: Tables that need fewer privileges. The audit is append-only, and only a migration writes s2s.migrations.
_FEWER: Final = {"s2s.audit": ("select", "insert"), "s2s.migrations": ("select",)}
#: The number of statements that a one-line error shows. ``s2s db status`` shows all of them.
_SHOWN: Final = 3

#: Finds a table without the USAGE privilege on its schema, which to_regclass needs.
_CLASS: Final = """pg_catalog.pg_class c on c.relname = split_part(n.name, '.', 2)
    and c.relnamespace = to_regnamespace(split_part(n.name, '.', 1))"""
#: The missing privileges on the existing tables of s2s, on their schemas and sequences, and on the functions of s2s.
_MISSING: Final = f"""
with ours as (
    select n.privilege, c.oid, c.oid::regclass::text as name, c.relnamespace
    from unnest(%s::text[], %s::text[]) as n (name, privilege) join {_CLASS}
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
from pg_catalog.pg_proc p where p.pronamespace = to_regnamespace('s2s')
and not has_function_privilege(p.oid, 'execute')
order by 1, 2, 3
"""  # noqa: S608 - of constants
#: The tables of s2s of which row level security may hide rows from this user. A table without restrictive policies that
#: has one policy which allows every row hides none.
_HIDDEN: Final = f"""
select c.oid::regclass::text, quote_ident(current_user)
from unnest(%s::text[]) as n (name) join {_CLASS}
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
"""  # noqa: S608 - of constants
#: The privileges that a migration lacks: it creates the schemas of s2s, unless they exist, and their tables.
_TO_MIGRATE: Final = """
select 'database', quote_ident(current_database()), array['create'], quote_ident(current_user)
from unnest(%s::text[]) as n (name)
where to_regnamespace(n.name) is null and not has_database_privilege(current_database(), 'create')
union
select 'schema', quote_ident(n.name), array['usage', 'create'], quote_ident(current_user)
from unnest(%s::text[]) as n (name)
where case when to_regnamespace(n.name) is not null
    then not has_schema_privilege(n.name, 'usage') or not has_schema_privilege(n.name, 'create') end
order by 1, 2
"""
#: An owner of s2s tables whose role this user may not use.
_OWNER: Final = f"""
select quote_ident(current_user), min(quote_ident(pg_get_userbyid(c.relowner)))
from unnest(%s::text[]) as n (name) join {_CLASS}
where not pg_has_role(c.relowner, 'usage')
"""  # noqa: S608 - of constants


def missing(txn: Cursor, plugins: Sequence[Migrations] = ()) -> list[str]:
    """Return the statements that grant missing privileges to the user of this connection; empty: none is missing."""
    names = sorted(migrations.tables(plugins) | _FEWER.keys())
    needed = [(name, each) for name in names for each in _FEWER.get(name, _ALL)]
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


def to_migrate(txn: Cursor, plugins: Sequence[Migrations] = ()) -> list[str]:
    """Return a line for each reason why the user of this connection cannot run the pending migrations."""
    if all(each.applied_at for each in migrations.status(txn, plugins)):
        return []
    schemas = [declared.schema for declared in (migrations.OWN, *plugins)]
    txn.execute(_TO_MIGRATE, (schemas, schemas))
    lines = [
        "a privilege to migrate is missing, run as the owner of the database:"
        f" grant {', '.join(privileges)} on {kind} {name} to {user};"
        for kind, name, privileges, user in txn
    ]
    txn.execute(_OWNER, (sorted(migrations.tables(plugins) | _FEWER.keys()),))
    ((user, owner),) = txn.fetchall()
    if owner is not None:
        lines.append(f"{user} may not change the tables of {owner}: run s2s db migrate as {owner}")
    return lines


def check(txn: Cursor, plugins: Sequence[Migrations] = ()) -> None:
    """Refuse a database if its user lacks a privilege, or if row level security hides rows from that user.

    :raises OperatorError: with the statements that fix it.
    """
    grants = missing(txn, plugins)
    if grants:
        shown = " ".join(grants[:_SHOWN])
        raise OperatorError(
            "the database user lacks privileges: run as the owner of the tables: " + shown + _more(grants, _SHOWN)
        )
    _refuse(hidden(txn))


@contextmanager
def explained(txn: Cursor, plugins: Sequence[Migrations] = ()) -> Iterator[None]:
    """If a migration fails, check whether its user lacks privileges.

    :raises OperatorError: the user lacks privileges; with the statements that fix it.
    """
    try:
        yield
    except (psycopg2.Error, migrations.MigrationFailed):
        if not is_broken(txn.connection):
            txn.connection.rollback()
            _refuse(hidden(txn) or to_migrate(txn, plugins))
        raise


def _refuse(lines: Sequence[str]) -> None:
    if lines:
        raise OperatorError(lines[0] + _more(lines, 1))


def _more(lines: Sequence[str], shown: int) -> str:
    return f" and {len(lines) - shown} more, which s2s db status lists" if len(lines) > shown else ""
