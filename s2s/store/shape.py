"""Check that a migrated database has its tables with columns, functions, triggers, unique indexes and one row.

A partial restore, or an interrupted ``pg_restore --disable-triggers``, leaves some of them out, and an owner may change
them. Some of these faults do not fail at once: settings change without a new version, orders change without an audit
entry, duplicates are accepted, and a crash empties an unlogged table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple

from s2s.errors import SchemaError
from s2s.store import migrations
from s2s.store.driver import Cursor
from s2s.store.kept_rows import Guard
from s2s.store.migrations import Migration

_TRIGGER: Final = re.compile(r"^create trigger (\w+)\s[^;]*?\son ([\w.]+)", re.MULTILINE)
_UNIQUE: Final = re.compile(r"^create unique index (\w+) on ([\w.]+)", re.MULTILINE)
_TABLE: Final = re.compile(r"^create table ([\w.]+) \((.*?)^\)", re.MULTILINE | re.DOTALL)
#: A column, its type, and the rest of its definition. Continuation lines are indented deeper than the first line.
_COLUMN: Final = re.compile(r"^ {4}(?!constraint |primary )(\w+) (\w+(?:\[\])?)((?:.*\n {8})*.*)", re.MULTILINE)
_COMMENT: Final = re.compile(r"(,?) *--.*$|,$", re.MULTILINE)
_FUNCTION: Final = re.compile(r"^create function ([\w.]+)\((.*?)\) returns", re.MULTILINE)
#: The setting of each function of s2s: the objects that it uses must not depend on the session that calls it.
_PATH: Final = "search_path = pg_catalog, pg_temp"
_CONSTRAINT: Final = re.compile(r"^ {4}constraint (\w+)", re.MULTILINE)
_DEFAULT: Final = re.compile(r"(?<!by )default (.+?)(?= check \(|$)")
_IDENTITY: Final = re.compile(r"generated (?:always|by default) as identity")
_UNIQUE_COLUMN: Final = re.compile(r"^ +(\w+) [^-\n]*\bunique\b", re.MULTILINE)
_IN_PART: Final = "as after a restore in part: restore the whole dump into an empty database"

#: Tables that are missing, or are not ordinary, logged tables without children.
_TABLES: Final = """
select n.name, c.relkind, c.relpersistence, array(
    select i.inhrelid::regclass::text from pg_catalog.pg_inherits i where i.inhparent = c.oid order by 1)
from unnest(%s::text[]) as n (name) left join pg_catalog.pg_class c on c.oid = to_regclass(n.name)
where c.oid is null or c.relkind <> 'r' or c.relpersistence <> 'p' or c.relhassubclass
order by 1
"""
_COLUMNS: Final = """
select n.relation, n.name, format_type(a.atttypid, a.atttypmod)
from unnest(%s::text[], %s::text[], %s::text[]) as n (relation, name, type)
join pg_catalog.pg_class c on c.oid = to_regclass(n.relation)
left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = n.name and not a.attisdropped
where a.atttypid is distinct from to_regtype(n.type)
order by 1, 2
"""
#: The columns, whether each must have a value, and whether it has one if a statement names none.
_VALUES: Final = """
select n.name, a.attname, quote_ident(a.attname), a.attnotnull or t.typnotnull,
    a.atthasdef or a.attidentity <> '' or t.typdefault is not null
from unnest(%s::text[]) as n (name)
join pg_catalog.pg_attribute a on a.attrelid = to_regclass(n.name)
join pg_catalog.pg_type t on t.oid = a.atttypid
where a.attnum > 0 and not a.attisdropped
order by 1, a.attnum
"""
#: Tables whose rows cannot be changed, because a publication has to identify them and cannot, with the publications.
_PUBLISHED: Final = """
select n.name, string_agg(quote_ident(p.pubname), ', ' order by p.pubname)
from unnest(%s::text[]) as n (name)
join pg_catalog.pg_class c on c.oid = to_regclass(n.name)
join pg_catalog.pg_namespace s on s.oid = c.relnamespace
join pg_catalog.pg_publication_tables t on t.schemaname = s.nspname and t.tablename = c.relname
join pg_catalog.pg_publication p on p.pubname = t.pubname
where (p.pubupdate or p.pubdelete) and c.relreplident <> 'f' and not exists (
    select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisvalid
    and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end
)
group by n.name order by 1
"""
#: Constraints and unique indexes that s2s has not made. Triggers that are constraints are found as triggers.
_FOREIGN: Final = """
with ours as (select * from unnest(%s::text[], %s::text[]) as n (relation, name)),
relation as (select distinct relation as name, to_regclass(relation) as oid from ours)
select r.name, 'constraint', quote_ident(k.conname)
from relation r join pg_catalog.pg_constraint k on k.conrelid = r.oid
where k.contype in ('c', 'f', 'p', 'u', 'x') and (r.name, k.conname) not in (select relation, name from ours)
union all
select r.name, 'index', x.oid::regclass::text
from relation r join pg_catalog.pg_index i on i.indrelid = r.oid join pg_catalog.pg_class x on x.oid = i.indexrelid
where i.indisunique and (r.name, x.relname) not in (select relation, name from ours)
    and not exists (select from pg_catalog.pg_constraint k where k.conindid = i.indexrelid and k.conrelid = r.oid)
order by 1, 2, 3
"""
_FUNCTIONS: Final = """
select n.name, p.oid is not null
from unnest(%s::text[]) as n (name) left join pg_catalog.pg_proc p on p.oid = to_regprocedure(n.name)
where p.proconfig is null or %s <> all(p.proconfig)
order by 1
"""
_TRIGGERS: Final = """
select n.name, c.oid::regclass::text, t.oid is not null
from unnest(%s::text[], %s::text[]) as n (name, relation)
join pg_catalog.pg_class c on c.oid = to_regclass(n.relation)
left join pg_catalog.pg_trigger t on t.tgrelid = c.oid and t.tgname = n.name
where t.tgenabled is null or t.tgenabled not in ('O', 'A')
order by 2, 1
"""
_INDEXES: Final = """
select n.name, c.oid::regclass::text
from unnest(%s::text[], %s::text[]) as n (name, relation)
join pg_catalog.pg_class c on c.oid = to_regclass(n.relation)
where not exists (
    select from pg_catalog.pg_index i join pg_catalog.pg_class x on x.oid = i.indexrelid
    where i.indrelid = c.oid and x.relname = n.name and i.indisvalid and i.indisunique
)
order by 2, 1
"""


class _Made(NamedTuple):
    """The objects that some migrations create.

    :ivar columns: the type and the definition of each column, by table and name.
    :ivar functions: the migration of each function, by its name with the types of its arguments.
    :ivar triggers: each trigger with its table.
    :ivar indexes: each unique index with its table.
    :ivar constraints: each other constraint with its table.
    """

    tables: list[str]
    columns: dict[tuple[str, str], tuple[str, str]]
    functions: dict[str, str]
    triggers: list[tuple[str, str]]
    indexes: list[tuple[str, str]]
    constraints: list[tuple[str, str]]


@cache
def _made(applied: tuple[Migration, ...]) -> _Made:
    """Return the objects that some migrations create."""
    made = _Made([], {}, {}, [], [], [])
    for migration in applied:
        made.triggers.extend(_TRIGGER.findall(migration.sql))
        made.indexes.extend(_UNIQUE.findall(migration.sql))
        for name, parameters in _FUNCTION.findall(migration.sql):
            types = ",".join(each.rpartition(" ")[2] for each in parameters.split(","))
            made.functions[f"{name}({types})"] = migration.name
        for table, body in _TABLE.findall(migration.sql):
            made.tables.append(table)
            name = table.partition(".")[2]
            for column, kind, rest in _COLUMN.findall(body):
                definition = " ".join(f"{column} {kind}{_COMMENT.sub('', rest)}".split())
                made.columns[table, column] = (kind, definition)
                if " check (" in definition:
                    made.constraints.append((f"{name}_{column}_check", table))
            made.constraints.extend((constraint, table) for constraint in _CONSTRAINT.findall(body))
            made.indexes.append((f"{name}_pkey", table))
            made.indexes.extend((f"{name}_{column}_key", table) for column in _UNIQUE_COLUMN.findall(body))
    return made


def wrong(txn: Cursor) -> Iterator[str]:
    """Return a line for each missing or changed object of s2s, with its cure; no lines before the first migration."""
    applied = {(each.schema, each.version) for each in migrations.status(txn) if each.applied_at}
    made = _made(tuple(each for each in migrations.available() if (each.schema, each.version) in applied))
    if not made.tables:
        return
    yield from _wrong_tables(txn, made)
    yield from _wrong_values(txn, made)
    yield from _unidentified(txn, made)
    yield from _wrong_functions(txn, made)
    yield from _wrong_triggers(txn, made)
    txn.execute(_INDEXES, ([name for name, _ in made.indexes], [table for _, table in made.indexes]))
    for name, table in txn.fetchall():
        yield f"the table {table} lacks the unique index {name}, {_IN_PART}"
    txn.execute("select to_regclass('s2s.config_version') is not null")
    if txn.fetchone() != (True,):
        return
    txn.execute("select from s2s.config_version")
    if not txn.rowcount:
        yield "the table s2s.config_version lacks its row, as after a restore in part: run: s2s db migrate"


def _wrong_tables(txn: Cursor, made: _Made) -> Iterator[str]:
    txn.execute(_TABLES, ([*made.tables, "s2s.migrations"],))
    for table, kind, persistence, children in txn.fetchall():
        if kind is None:
            yield f"the table {table} is missing, {_IN_PART}"
        elif kind != "r":
            yield f"{table} is no ordinary table: put a table in its place, with the rows that are to stay"
        elif persistence != "p":
            yield (
                f"the table {table} is unlogged, and a crash of the database empties it: run as the owner of the"
                f" table: alter table {table} set logged"
            )
        for child in children or ():
            yield (
                f"the rows of the table {child}, which inherits from {table}, count as rows of {table}, without its"
                f" keys and triggers: run as the owner of the table: alter table {child} no inherit {table}"
            )
    columns = [(table, name, kind) for (table, name), (kind, _) in made.columns.items()]
    txn.execute(_COLUMNS, tuple(map(list, zip(*columns, strict=True))))
    for table, name, found in txn.fetchall():
        kind, definition = made.columns[table, name]
        if found is None:
            yield (
                f"the table {table} lacks the column {name}: restore the table from a backup, or run as its owner, for"
                f" an empty column: alter table {table} add column {definition}"
            )
        else:
            yield (
                f"the column {name} of the table {table} has the type {found}: run as the owner of the table:"
                f" alter table {table} alter column {name} type {kind} using {name}::{kind}"
            )


def _wrong_values(txn: Cursor, made: _Made) -> Iterator[str]:
    """Return a line for each column for which a row that s2s writes has no value."""
    txn.execute(_VALUES, (made.tables,))
    for table, name, quoted, is_required, has_value in txn.fetchall():
        _, definition = made.columns.get((table, name), ("", ""))
        alter = f"run as the owner of the table: alter table {table} alter column {quoted}"
        default, identity = _DEFAULT.search(definition), _IDENTITY.search(definition)
        if not definition and is_required and not has_value:
            yield (
                f"the column {name} of the table {table}, which s2s has not made, needs a value, and s2s writes none:"
                f" {alter} drop not null"
            )
        elif definition and is_required and not ("not null" in definition or "primary key" in definition):
            yield f"the column {name} of the table {table} takes no null, and s2s writes nulls: {alter} drop not null"
        elif not has_value and identity:
            yield f"the column {name} of the table {table} has lost its numbers: {alter} add {identity[0]}"
        elif not has_value and default:
            yield f"the column {name} of the table {table} has lost its default: {alter} set default {default[1]}"


def _unidentified(txn: Cursor, made: _Made) -> Iterator[str]:
    txn.execute(_PUBLISHED, (made.tables,))
    for table, publications in txn.fetchall():
        yield (
            f"no row of the table {table} can be changed, because the publication {publications} finds no replica"
            f" identity: run as the owner of the table: alter table {table} replica identity default"
        )


def foreign(txn: Cursor) -> list[Guard]:
    """Return the constraints and unique indexes on tables of s2s that s2s has not made."""
    made = _made(migrations.available())
    ours = [*made.indexes, *made.constraints]
    txn.execute(_FOREIGN, ([table for _, table in ours], [name for name, _ in ours]))
    verbs = frozenset(("insert", "update"))
    return [Guard(table, kind, name, verbs, keeps=False) for table, kind, name in txn.fetchall()]


def _wrong_functions(txn: Cursor, made: _Made) -> Iterator[str]:
    txn.execute(_FUNCTIONS, (list(made.functions), _PATH.replace(" = ", "=")))
    for name, is_there in txn.fetchall():
        if is_there:
            yield (
                f"the function {name} resolves names by the search_path of each session: run as its owner:"
                f" alter function {name} set {_PATH}"
            )
        else:
            yield (
                f"the function {name} is missing: run as the owner of the tables the statement that makes it, in the"
                f" file s2s/store/sql/{made.functions[name]}.sql of the package"
            )


def _wrong_triggers(txn: Cursor, made: _Made) -> Iterator[str]:
    txn.execute(_TRIGGERS, ([name for name, _ in made.triggers], [table for _, table in made.triggers]))
    off = txn.fetchall()
    for table in sorted({table for _, table, is_there in off if is_there}):
        names = ", ".join(name for name, each, is_there in off if is_there and each == table)
        yield (
            f"triggers of the table {table} are disabled ({names}), as after an interrupted pg_restore"
            f" --disable-triggers: run as the owner of the table: alter table {table} enable trigger user"
        )
    for name, table, is_there in off:
        if not is_there:
            yield f"the table {table} lacks the trigger {name}, {_IN_PART}"


def check(txn: Cursor) -> None:
    """Refuse a database with a missing or changed object.

    :raises SchemaError: with the first line of :func:`wrong`.
    """
    for line in wrong(txn):
        raise SchemaError(line)
