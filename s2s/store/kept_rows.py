"""Rows of ours that are not written, without an error: a trigger, a rule or a policy of another hand keeps them.

A trigger ``before … for each row`` that returns null, a rule ``do instead nothing`` and row level security leave a row
as it is. Each statement of ours compares the number of rows that it has written with the number that it was to write.
Where rows are missing, it looks whether they are there still: another session may have changed them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from psycopg2.extensions import cursor

from s2s.errors import StatementRefused

#: An upsert is both of the first two.
Verb = Literal["insert", "update", "delete", "insert or update"]
#: Why a statement counts as refused that has written fewer rows than it was to write.
KEPT: Final = "a trigger or a rule keeps a row from being written"
#: Stands in for a SQLSTATE, of which there is none (:mod:`s2s.store.sqlstate`).
STATE: Final = "09000 kept"
#: The SQLSTATE of a statement that PostgreSQL refuses because of a rule.
RULE_STATE: Final = "0A000 RewriteQuery"
#: Triggers, rules and policies that one line names.
_SHOWN: Final = 5

#: Functions of ours are in the schema s2s. A type of 1 is for each row, 2 is before, 64 is instead of. The last column
#: says whether it can keep a row without an error.
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
    """Something of another hand that runs where rows of a table are written.

    :param kind: ``trigger``, ``rule`` or ``policy``.
    :param name: as SQL writes it.
    :param verbs: the statements that it is for.
    :param function: of a trigger.
    :param keeps: whether it may keep a row from being written without an error; other triggers can only fail.
    """

    table: str
    kind: Literal["trigger", "rule", "policy"]
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
        return f"drop {self.kind} {self.name} on {self.table}"


def guards(txn: cursor, tables: Iterable[str]) -> list[Guard]:
    """Return what may keep rows of some tables from being written."""
    return [each for each in foreign(txn, tables) if each.keeps]


def foreign(txn: cursor, tables: Iterable[str]) -> list[Guard]:
    """Return all triggers, rules and policies of another hand on some tables."""
    txn.execute(_FOREIGN, (sorted(tables),))
    return [
        Guard(table, kind, name, frozenset(verbs), function, keeps)
        for table, kind, name, verbs, function, keeps in txn.fetchall()
    ]


def described(found: Sequence[Guard]) -> str:
    """Name what was found, and the statements that remove it; empty: nothing was found."""
    if not found:
        return ""
    names, cures = "; ".join(map(str, found[:_SHOWN])), "; ".join(guard.cure for guard in found[:_SHOWN])
    return f"{names}{f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''}: {cures}"


def refusal(txn: cursor, verb: Verb, table: str) -> StatementRefused:
    """Return the error that says which table keeps its rows, and by what."""
    what = _suspects(txn, verb, table) or f"see the triggers, rules and policies of {table}"
    return StatementRefused(f"{KEPT} ({verb} on {table}): {what}", state=STATE)


def _suspects(txn: cursor, verb: Verb, table: str) -> str:
    verbs = verb.split(" or ")
    return described([guard for guard in guards(txn, [table]) if not guard.verbs.isdisjoint(verbs)])


def note(txn: cursor, verb: Verb, table: str) -> None:
    """Tell the operator, once the transaction is committed, that rows are kept, and go on.

    Where nothing of another hand is there, another session has changed the rows in between, and nothing is told.
    """
    kept, what = getattr(txn.connection, "kept", None), _suspects(txn, verb, table)
    if what and kept is not None:
        kept.append(StatementRefused(f"{KEPT} ({verb} on {table}): {what}", state=STATE))


def check_written(txn: cursor, verb: Verb, table: str, rows: int = 1) -> None:
    """Refuse to go on where the last statement has written fewer rows than it was to write.

    :raises StatementRefused: it has.
    """
    if txn.rowcount < rows:
        raise refusal(txn, verb, table)


def still_there(
    txn: cursor, verb: Verb, table: str, column: str, keys: Collection[Any], condition: str = "true"
) -> list[Any]:
    """Return those of some rows that were to be written and are as they were, and tell the operator of them.

    :param keys: of the rows that a statement has not written.
    :param condition: what is true of a row that was not written.
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
