"""The privileges that the user of the database needs, and the statements that grant those that are missing."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from s2s.errors import OperatorError
from s2s.store import migrations
from s2s.store.driver import Cursor

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


def check(txn: Cursor) -> None:
    """Refuse a database whose user lacks a privilege.

    :raises OperatorError: with the statements that grant it.
    """
    grants = missing(txn)
    if grants:
        more = f" and {len(grants) - _SHOWN} more, which s2s db status lists" if len(grants) > _SHOWN else ""
        shown = " ".join(grants[:_SHOWN])
        raise OperatorError(f"the database user lacks privileges: run as the owner of the tables: {shown}{more}")
