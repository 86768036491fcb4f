"""The sequences of s2s tables: if a sequence is behind the rows of its table, new rows collide with existing ones.

Copying rows, or restoring them with ``pg_restore --data-only``, does not advance the sequences of their ids. If a
sequence has reached its bound, no row can be inserted at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from psycopg2 import sql
from psycopg2.errors import LockNotAvailable
from twisted.logger import Logger

from s2s.errors import SchemaError
from s2s.store import migrations, sqlstate
from s2s.store.driver import Connection, Cursor
from s2s.store.lock_wait import PATIENCE_S, LockWait, trial

#: The sequences that identity or serial columns of some tables own. Sequences that this user may not read are left out.
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
#: A sequence is reported when fewer than one in this many of its values are left.
_LAST: Final = 100
#: The largest id: the largest integer of JSON on the wire.
_MOST: Final = 2**53 - 1
_LOG: Final = Logger()


@dataclass(frozen=True)
class Behind:
    """A sequence that is behind the rows of its table.

    :ivar sequence: its name, quoted for SQL; ``table`` likewise.
    :ivar stands_at: the last value that it returned.
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


class _Owned(NamedTuple):
    """A row of ``_OWNED``."""

    name: str
    column: str
    sequence: str
    table: str
    start: int
    step: int
    least: int
    most: int


def wrong(txn: Cursor) -> Iterator[tuple[str, bool]]:
    """Return a line for each fault, with its cure, and whether the fault keeps new rows from getting an unused id.

    A table that another session has locked is not checked; a line says so.
    """
    for each in _owned(txn):
        found: list[tuple[str, bool]] = []
        try:
            with trial(txn):
                found = list(_wrong(txn, each))
        except LockNotAvailable:
            found = [
                (
                    f"the sequence of {each.table}.{each.column} is not checked, since another session has locked the"
                    f" table: {sqlstate.meaning('55P03').cure}",
                    False,
                )
            ]
        yield from found


def _wrong(txn: Cursor, each: _Owned) -> Iterator[tuple[str, bool]]:
    largest, stands_at = _look(txn, each)
    if largest > stands_at:
        behind = Behind(each.column, each.sequence, each.table, stands_at, largest)
        yield f"{behind}, as after a restore of rows without their sequences: run: {_CURE}", True
    least, most = max(each.least, -_MOST), min(each.most, _MOST)
    bound = most if each.step > 0 else least
    left = max(0, (bound - stands_at) // each.step)
    if left * _LAST < (most - least) // abs(each.step) or not left:
        # A bound at the limit of the wire cannot be raised: the sequence was set by hand, so it is set back.
        cure = (
            f"alter sequence {each.sequence} as bigint no maxvalue no minvalue"
            if abs(bound) < _MOST
            else f"select setval('{each.sequence}', coalesce(max({each.column}), 1)) from {each.table}"  # noqa: S608
            f" where {each.column} <= {_MOST}"
        )
        yield (
            f"the sequence of {each.table}.{each.column} stands at {stands_at}, its bound is {bound}, and it"
            f" {f'has {left} values left' if left else 'is exhausted: no new row gets an id'}:"
            f" run as the owner of the table: {cure}",
            not left,
        )
    txn.execute(
        sql.SQL("select {id} from {table} where {id} > {most} order by {id} desc limit 1").format(
            id=sql.Identifier(each.column), table=_named(each.table), most=sql.Literal(_MOST)
        )
    )
    for (above,) in txn.fetchall():
        change = f"update {each.table} set {each.column} = default where {each.column} > {_MOST}"  # noqa: S608
        yield (
            f"the id of a row of {each.table} is {above}, and above {_MOST} no id can be sent: delete the row, or give"
            f" it an id of the sequence: {change}",
            False,
        )


def check(txn: Cursor) -> None:
    """Refuse a database in which new rows would collide with existing ones or get no id. Log all other faults.

    :raises SchemaError: the text names the sequence and the cure.
    """
    for line, refuses in wrong(txn):
        if refuses:
            raise SchemaError(line)
        _LOG.warn("{line}", line=line)


def fix(conn: Connection, tell: Callable[[str], object], patience_s: float = PATIENCE_S) -> Iterator[Behind]:
    """Set each sequence that is behind to the largest id of its table, in a transaction of its own.

    :param conn: an open connection, not in autocommit.
    :param tell: see :class:`~s2s.store.lock_wait.LockWait`, also for ``patience_s``.
    :returns: the state of each sequence before the change, once the sequence is set.
    :raises OperatorError: other sessions held the locks for too long; the sequences returned before are set.
    """
    locks = LockWait(conn, tell, patience_s)
    with locks.watched():
        for each in locks.run(_owned):
            if fixed := locks.run(partial(_fix, each)):
                yield fixed


def _fix(each: _Owned, txn: Cursor) -> Behind | None:
    largest, stands_at = _look(txn, each)
    if largest <= stands_at:
        return None
    # The lock makes inserts wait: each takes its id either before the sequence is set or after.
    txn.execute(sql.SQL("lock table {} in share row exclusive mode").format(_named(each.table)))
    now_largest, now_at = _look(txn, each)
    txn.execute("select setval(%s::regclass, greatest(%s, %s))", (each.sequence, now_largest, now_at))
    return Behind(each.column, each.sequence, each.table, stands_at, largest)


def _owned(txn: Cursor) -> list[_Owned]:
    txn.execute(_OWNED, (list(migrations.tables()),))
    return [_Owned(*row) for row in txn.fetchall()]


def _look(txn: Cursor, each: _Owned) -> tuple[int, int]:
    """Return the largest id that can be sent, and the last value of the sequence.

    One statement reads both. It takes its snapshot before it reads the sequence, which no snapshot covers. A concurrent
    insert can therefore move the sequence ahead of the visible ids, and never the other way round.
    """
    look = sql.SQL("select coalesce(max({id}), 0), pg_sequence_last_value(%s::regclass) from {table} where {id} <= %s")
    txn.execute(look.format(id=sql.Identifier(each.column), table=_named(each.table)), (each.sequence, _MOST))
    largest, stands_at = txn.fetchone() or (0, None)
    return int(largest), each.start if stands_at is None else int(stands_at)


def _named(table: str) -> sql.SQL:
    """Return a name that the database has already quoted."""
    return sql.SQL(table)
