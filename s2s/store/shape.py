"""What a migrated database must have beside its tables: triggers, unique indexes, the row of the version.

A restore in part, or one with ``pg_restore --disable-triggers`` that was interrupted, leaves some of them out. Nothing
fails then at once: settings change without a version, orders without an audit, and duplicates are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Final

from s2s.errors import SchemaError
from s2s.store import migrations
from s2s.store.driver import Cursor

_TRIGGER: Final = re.compile(r"^create trigger (\w+)\s[^;]*?\son ([\w.]+)", re.MULTILINE)
_UNIQUE: Final = re.compile(r"^create unique index (\w+) on ([\w.]+)", re.MULTILINE)
_TABLE: Final = re.compile(r"^create table ([\w.]+) \((.*?)^\)", re.MULTILINE | re.DOTALL)
_UNIQUE_COLUMN: Final = re.compile(r"^ +(\w+) [^-\n]*\bunique\b", re.MULTILINE)
_IN_PART: Final = "as after a restore in part: restore the whole dump into an empty database"

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


@cache
def _made() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the triggers and the unique indexes that the migrations make, each with its table."""
    triggers, indexes = [], []
    for migration in migrations.available():
        triggers += _TRIGGER.findall(migration.sql)
        indexes += _UNIQUE.findall(migration.sql)
        for table, body in _TABLE.findall(migration.sql):
            name = table.partition(".")[2]
            indexes.append((f"{name}_pkey", table))
            indexes += [(f"{name}_{column}_key", table) for column in _UNIQUE_COLUMN.findall(body)]
    return triggers, indexes


def wrong(txn: Cursor) -> Iterator[str]:
    """Return a line for each thing that is missing or switched off, with its cure; none before the first migration."""
    triggers, indexes = _made()
    txn.execute(_TRIGGERS, ([name for name, _ in triggers], [table for _, table in triggers]))
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
    txn.execute(_INDEXES, ([name for name, _ in indexes], [table for _, table in indexes]))
    for name, table in txn.fetchall():
        yield f"the table {table} lacks the unique index {name}, {_IN_PART}"
    txn.execute("select to_regclass('s2s.config_version') is not null")
    if txn.fetchone() != (True,):
        return
    txn.execute("select from s2s.config_version")
    if not txn.rowcount:
        yield "the table s2s.config_version lacks its row, as after a restore in part: run: s2s db migrate"


def check(txn: Cursor) -> None:
    """Refuse a database that lacks something.

    :raises SchemaError: the first line of :func:`wrong`.
    """
    for line in wrong(txn):
        raise SchemaError(line)
