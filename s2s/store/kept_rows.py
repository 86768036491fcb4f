"""Rows of s2s that a foreign trigger, rule or policy keeps from being written, without an error.

A trigger ``before … for each row`` that returns null, a rule ``do instead nothing`` and row level security leave a row
unchanged. Each statement of s2s compares the number of rows written with the number expected. If rows are missing, it
checks whether they are still there, because another session may have changed them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from psycopg2.extensions import cursor

from s2s.errors import StatementRefused

#: The verb of a statement; an upsert is "insert or update".
Verb = Literal["insert", "update", "delete", "insert or update"]
#: The reason for which a statement that wrote fewer rows than expected counts as refused.
KEPT: Final = "a trigger or a rule keeps a row from being written"
#: Used in place of a SQLSTATE, because PostgreSQL raises no error (:mod:`s2s.store.sqlstate`).
STATE: Final = "09000 kept"
#: The code (:func:`s2s.store.sqlstate.code`) of a statement that PostgreSQL refuses because of a rule.
RULE_STATE: Final = "0A000 RewriteQuery"
#: The number of triggers, rules and policies that one line names.
_SHOWN: Final = 5

#: Foreign triggers, rules and policies on some tables; the trigger functions of s2s are in the schema s2s. In tgtype,
#: bit 1 is "for each row", 2 is "before" and 64 is "instead of". The last column is whether the object can keep a row
#: from being written without an error.
_FOREIGN: Final = """
with ours as (
    select to_regclass(n.name) as oid from unnest(%s::text[]) as n (name) where to_regclass(n.name) is not null
)
select t.tgrelid::regclass::text, 'trigger', quote_ident(t.tgname), array_remove(array[
    case when t.tgtype & 4 > 0 then 'insert' end, case when t.tgtype & 16 > 0 then 'update' end,
    case when t.tgtype & 8 > 0 then 'delete' end, case when t.tgtype & 32 > 0 then 'truncate' end], null),
    p.oid::regprocedure::text, t.tgtype & 67 = 3
from ours join pg_catalog.pg_trigger t on t.tgrelid = ours.oid join pg_catalog.pg_proc p on p.oid = t.tgfoid
where not t.tgisinternal and t.tgenabled in ('O', 'A')
    and p.pronamespace is distinct from to_regnamespace('s2s')
union all
select r.ev_class::regclass::text, 'rule', quote_ident(r.rulename),
    array[case r.ev_type when '2' then 'update' when '3' then 'insert' else 'delete' end], '', true
from ours join pg_catalog.pg_rewrite r on r.ev_class = ours.oid
where r.ev_type in ('2', '3', '4') and r.ev_enabled in ('O', 'A')
union all
select oid::regclass::text, 'policy', 'row level security', array['insert', 'update', 'delete'], '', true
from ours where row_security_active(oid)
order by 1, 2, 3
"""


@dataclass(frozen=True)
class Guard:
    """A foreign trigger, rule, policy, constraint or unique index, for which rows of a table are written or not.

    :param kind: ``trigger``, ``rule``, ``policy``, ``constraint`` or ``index``.
    :param name: the name, quoted for SQL.
    :param verbs: the statements on which it runs.
    :param function: the function of a trigger.
    :param keeps: whether it may keep a row from being written without an error; other triggers can only fail.
    """

    table: str
    kind: Literal["trigger", "rule", "policy", "constraint", "index"]
    name: str
    verbs: frozenset[str]
    function: str = ""
    keeps: bool = True

    def __str__(self) -> str:
        if self.kind == "policy":
            return f"row level security on {self.table}"
        function = f", function {self.function}" if self.function else ""
        return f"{self.kind} {self.name} on {self.table} ({' or '.join(sorted(self.verbs))}{function})"

    @property
    def cure(self) -> str:
        """The statement that removes it."""
        if self.kind == "policy":
            return f"alter table {self.table} disable row level security"
        if self.kind == "constraint":
            return f"alter table {self.table} drop constraint {self.name}"
        return f"drop index {self.name}" if self.kind == "index" else f"drop {self.kind} {self.name} on {self.table}"

    @property
    def effect(self) -> str:
        """Its effect on the work of s2s."""
        if self.kind in ("constraint", "index"):
            return "if it refuses a row, the statement fails"
        return "where it keeps a row from being written, work is done again or not at all"


def guards(txn: cursor, tables: Iterable[str]) -> list[Guard]:
    """Return the triggers, rules and policies that may keep rows of some tables from being written."""
    return [each for each in foreign(txn, tables) if each.keeps]


def foreign(txn: cursor, tables: Iterable[str]) -> list[Guard]:
    """Return all foreign triggers, rules and policies on some tables."""
    txn.execute(_FOREIGN, (sorted(tables),))
    return [
        Guard(table, kind, name, frozenset(verbs), function, keeps)
        for table, kind, name, verbs, function, keeps in txn.fetchall()
    ]


def described(found: Sequence[Guard]) -> str:
    """Return the names of the guards and the statements that remove them; empty: no guard was found."""
    if not found:
        return ""
    names, cures = "; ".join(map(str, found[:_SHOWN])), "; ".join(guard.cure for guard in found[:_SHOWN])
    return f"{names}{f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''}: {cures}"


def refusal(txn: cursor, verb: Verb, table: str) -> StatementRefused:
    """Return the error that names the table and the triggers, rules and policies that keep its rows."""
    suspects = _suspects(txn, verb, table) or f"see the triggers, rules and policies of {table}"
    return StatementRefused(f"{KEPT} ({verb} on {table}): {suspects}", state=STATE)


def _suspects(txn: cursor, verb: Verb, table: str) -> str:
    verbs = verb.split(" or ")
    return described([guard for guard in guards(txn, [table]) if not guard.verbs.isdisjoint(verbs)])


def note(txn: cursor, verb: Verb, table: str) -> None:
    """Record rows that were kept, to be reported to the operator after the COMMIT, and continue.

    Without a foreign trigger, rule or policy, another session has changed the rows meanwhile: nothing is recorded.
    """
    kept, suspects = getattr(txn.connection, "kept", None), _suspects(txn, verb, table)
    if suspects and kept is not None:
        kept.append(StatementRefused(f"{KEPT} ({verb} on {table}): {suspects}", state=STATE))


def check_written(txn: cursor, verb: Verb, table: str, rows: int = 1) -> None:
    """Raise an error if the last statement wrote fewer rows than expected.

    :raises StatementRefused: it wrote fewer than ``rows`` rows.
    """
    if txn.rowcount < rows:
        raise refusal(txn, verb, table)


def still_there(
    txn: cursor, verb: Verb, table: str, column: str, keys: Collection[Any], condition: str = "true"
) -> list[Any]:
    """Return the keys of the rows that are still unwritten, and record them for the operator with :func:`note`.

    :param keys: the keys of the rows that a statement did not write.
    :param condition: the SQL condition that holds for an unwritten row.
    """
    if not keys:
        return []
    txn.execute(
        f"select {column} from {table} where {column} = any(%s) and ({condition})",  # noqa: S608 - constants of callers
        (list(keys),),
    )
    kept = [key for (key,) in txn.fetchall()]
    if kept:
        note(txn, verb, table)
    return kept
