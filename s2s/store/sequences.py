"""The sequences of our tables: one that stands behind its rows makes every new row collide with an old one.

Rows that are copied, or restored by ``pg_restore --data-only``, do not move the sequences of their ids. A sequence that
has come to its bound lets no new row in at all.
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
       settings.seqstart - settings.seqincrement, settings.seqincrement, settings.seqmin, settings.seqmax
from pg_sequence settings
join pg_depend owns on owns.classid = 'pg_class'::regclass and owns.objid = settings.seqrelid
    and owns.refclassid = 'pg_class'::regclass and owns.deptype in ('a', 'i')
join pg_class tables on tables.oid = owns.refobjid
join pg_attribute columns on columns.attrelid = tables.oid and columns.attnum = owns.refobjsubid
where tables.oid in (select to_regclass(name) from unnest(%s::text[]) name)
    and has_sequence_privilege(settings.seqrelid, 'select, usage') and has_table_privilege(tables.oid, 'select')
order by 1
"""
_CURE: Final = "s2s db fix-sequences"
#: A sequence that has given all of its values but one in so many is told of.
_LAST: Final = 100
_MOST: Final = 2**63 - 1


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


@dataclass(frozen=True)
class Ending:
    """A sequence that has come to its bound, or nearly so.

    :ivar left: how many values it can still give.
    """

    column: str
    sequence: str
    table: str
    stands_at: int
    bound: int
    left: int

    def __str__(self) -> str:
        # The bound of a bigint cannot be raised: such a sequence was set by hand.
        cure = (
            f"alter sequence {self.sequence} as bigint no maxvalue no minvalue"
            if abs(self.bound) < _MOST
            else f"select setval('{self.sequence}', coalesce(max({self.column}), 1)) from {self.table}"  # noqa: S608
        )
        left = f"has {self.left} values left" if self.left else "is exhausted: no new row gets an id"
        return (
            f"the sequence of {self.table}.{self.column} stands at {self.stands_at}, its bound is {self.bound},"
            f" and it {left}: run as the owner of the table: {cure}"
        )


def ending(txn: Cursor) -> list[Ending]:
    """List the sequences that have come to their bounds, or nearly so."""
    found = []
    txn.execute(_OWNED, (list(migrations.tables()),))
    for _, column, sequence, table, start, step, least, most in txn.fetchall():
        txn.execute("select coalesce(pg_sequence_last_value(%s::regclass), %s)", (sequence, start))
        ((stands_at,),) = txn.fetchall()
        bound = most if step > 0 else least
        left = max(0, (bound - stands_at) // step)
        if left * _LAST < (most - least) // abs(step) or not left:
            found.append(Ending(column, sequence, table, stands_at, bound, left))
    return found


def behind(txn: Cursor) -> list[Behind]:
    """List the sequences that stand behind the rows of their tables."""
    txn.execute(_OWNED, (list(migrations.tables()),))
    found = []
    for _, column, sequence, table, start, *_ in txn.fetchall():
        largest, stands_at = _look(txn, column, sequence, table)
        stands_at = start if stands_at is None else stands_at
        if largest > stands_at:
            found.append(Behind(column, sequence, table, stands_at, largest))
    return found


def check(txn: Cursor) -> None:
    """Refuse a database in which new rows would collide with old ones, or get no id.

    :raises SchemaError: the text names the sequence, and the cure.
    """
    for exhausted in (each for each in ending(txn) if not each.left):
        raise SchemaError(str(exhausted))
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
