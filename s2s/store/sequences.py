"""The sequences of our tables: one that stands behind its rows makes every new row collide with an old one.

Rows that are copied, or restored by ``pg_restore --data-only``, do not move the sequences of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from psycopg2 import sql

from s2s.errors import SchemaError
from s2s.store import migrations
from s2s.store.driver import Cursor

#: The sequences that columns of some tables own, by identity or as a serial. One that we may not read is left out.
_OWNED: Final = """
select tables.relname, columns.attname, settings.seqrelid::regclass::text, tables.oid::regclass::text,
       settings.seqstart - settings.seqincrement
from pg_sequence settings
join pg_depend owns on owns.classid = 'pg_class'::regclass and owns.objid = settings.seqrelid
    and owns.refclassid = 'pg_class'::regclass and owns.deptype in ('a', 'i')
join pg_class tables on tables.oid = owns.refobjid
join pg_attribute columns on columns.attrelid = tables.oid and columns.attnum = owns.refobjsubid
where tables.relname = any(%s) and pg_table_is_visible(tables.oid)
    and has_sequence_privilege(settings.seqrelid, 'select, usage') and has_table_privilege(tables.oid, 'select')
order by 1
"""
_CURE: Final = "s2s db fix-sequences"


@dataclass(frozen=True)
class Behind:
    """A sequence that stands behind the rows of its table.

    :ivar sequence: its name in SQL, as that of the table.
    :ivar stands_at: the last value that it gave.
    :ivar largest: the largest id in the table.
    """

    column: str
    sequence: str
    table: str
    stands_at: int
    largest: int

    def __str__(self) -> str:
        where = f"{self.table}.{self.column}"
        return f"the sequence of {where} stands at {self.stands_at} and the largest id is {self.largest}"


def behind(txn: Cursor) -> list[Behind]:
    """List the sequences that stand behind the rows of their tables."""
    txn.execute(_OWNED, (list(migrations.tables()),))
    found = []
    for _, column, sequence, table, start in txn.fetchall():
        largest, stands_at = _look(txn, column, sequence, table)
        stands_at = start if stands_at is None else stands_at
        if largest > stands_at:
            found.append(Behind(column, sequence, table, stands_at, largest))
    return found


def check(txn: Cursor) -> None:
    """Refuse a database in which new rows would collide with old ones.

    :raises SchemaError: the text names the sequence, and the cure.
    """
    for each in behind(txn):
        raise SchemaError(f"{each}, as after a restore of rows without their sequences: run: {_CURE}")


def fix(txn: Cursor) -> list[Behind]:
    """Set the sequences that stand behind to the largest ids.

    :returns: how they stood.
    """
    fixed = behind(txn)
    for each in fixed:
        # A row that is inserted meanwhile has taken its id before the sequence is set, or takes it after that.
        txn.execute(sql.SQL("lock table {} in share row exclusive mode").format(_named(each.table)))
        largest, stands_at = _look(txn, each.column, each.sequence, each.table)
        txn.execute("select setval(%s::regclass, greatest(%s, %s))", (each.sequence, largest, stands_at or 0))
    return fixed


def _look(txn: Cursor, column: str, sequence: str, table: str) -> tuple[int, int | None]:
    """Return the largest id, and the last value of its sequence; ``None``: it has not given any.

    One statement reads both: its snapshot is older than its look at the sequence, which no snapshot holds. A row that
    is inserted meanwhile can move the sequence ahead of the ids that are seen, and never the other way.
    """
    look = sql.SQL("select coalesce(max({}), 0), pg_sequence_last_value(%s::regclass) from {}")
    txn.execute(look.format(sql.Identifier(column), _named(table)), (sequence,))
    largest, stands_at = txn.fetchone() or (0, None)
    return int(largest), stands_at


def _named(table: str) -> sql.SQL:
    """Return a name that the database has quoted itself."""
    return sql.SQL(table)
