"""Read a list page by page with bounded work: the newest rows first, below a cursor that is a key.

A statement contains only the given filters, because "x is null or ..." would keep the planner from using an index. If
no index covers all filters, a page reads a bounded stretch of the table, or of one index, and returns where it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final, Generic, TypeVar

from psycopg2.errors import LockNotAvailable, QueryCanceled

from s2s.errors import DeadlineExceeded
from s2s.store.driver import Cursor
from s2s.store.lock_wait import TRY_S, Locked

T = TypeVar("T")

#: Rows of a stretch: about 10 ms of the database's time, or 50 ms if the rows come from the disk.
STRETCH_ROWS: Final = 10_000
#: Seconds that one statement of a list may take.
LIMIT_S: Final = 2.0


#: A bound above every key.
_NO_END: Final = 2**63 - 1


@dataclass(frozen=True)
class Listed(Generic[T]):
    """A table that is listed with the newest rows first.

    :param row: the type of a row; its fields are the columns that are read.
    :param key: the primary key, a growing number.
    :param indexed: the columns with an index on (column, key), the most selective column first.
    :param partial: pairs of a column and a value for which there is a partial index on the key.
    """

    row: type[T]
    table: str
    key: str
    indexed: tuple[str, ...] = ()
    partial: tuple[tuple[str, str], ...] = ()

    def read(self, txn: Cursor, limit: int, before: int | None, floor: int | None = None, **filters: Any) -> list[T]:
        """Return the next rows.

        :param before: only rows older than this key, the last key of the page before.
        :param floor: no rows older than this key.
        :param filters: the required values of columns; ``None``: any value.
        """
        columns = ", ".join(field.name for field in fields(self.row))  # type: ignore[arg-type]
        given = _given(filters)
        lead = self._lead(given)
        rest = [f"{name} = %({name})s" for name in given if name != lead]
        self._select(txn, columns, lead, rest, {**given, "before": before, "floor": floor}, f"limit {int(limit)}")
        return [self.row(*row) for row in txn]

    def floor(self, txn: Cursor, before: int | None, **filters: Any) -> int | None:
        """Return the last key of the stretch below ``before``.

        :returns: ``None``: one index covers all filters, or the stretch reaches the end of the table.
        """
        given = _given(filters)
        lead = self._lead(given)
        if not given.keys() - {lead}:
            return None
        params = {**given, "before": before, "floor": None}
        self._select(txn, self.key, lead, [], params, f"offset {STRETCH_ROWS - 1} limit 1")
        row = txn.fetchone()
        return None if row is None else int(row[0])

    def _lead(self, given: Mapping[str, Any]) -> str | None:
        """Return the column of the filter whose index is read."""
        partial = (name for name, value in self.partial if given.get(name) == value)
        return next((name for name in self.indexed if name in given), next(partial, None))

    def _select(
        self, txn: Cursor, columns: str, lead: str | None, rest: list[str], params: dict[str, Any], limit: str
    ) -> None:
        order = [self.key]
        if lead in self.indexed:
            # With "lead = ..." the planner would often choose the index on the key alone, expecting such rows sooner.
            order = [lead, self.key]
            bounds = f"({lead}, {self.key}) {{}} (%({lead})s, %({{}})s::bigint)"
            params["before"] = _NO_END if params["before"] is None else params["before"]
            params["floor"] = params["floor"] or 0
        else:
            bounds = f"{self.key} {{}} %({{}})s::bigint"
            rest = rest + [f"{lead} = %({lead})s"] * (lead is not None)
        where = rest + [
            bounds.format(than, name) for than, name in (("<", "before"), (">=", "floor")) if params[name] is not None
        ]
        condition = f" where {' and '.join(where)}" if where else ""
        by = ", ".join(f"{column} desc" for column in order)
        txn.execute(f"select {columns} from {self.table}{condition} order by {by} {limit}", params)  # noqa: S608


def _given(filters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in filters.items() if value is not None}


@contextmanager
def time_limit(txn: Cursor) -> Iterator[None]:
    """Limit each statement of this transaction to :data:`LIMIT_S`, and its wait for a lock to ``TRY_S``, which is less.

    :raises Locked: a statement waited for a lock. A request for fewer rows would wait for it as well.
    :raises DeadlineExceeded: a statement was stopped at the limit.
    """
    txn.execute(
        "select set_config('statement_timeout', %s, true), set_config('lock_timeout', %s, true)",
        (f"{round(LIMIT_S * 1000)}ms", f"{round(TRY_S * 1000)}ms"),
    )
    try:
        yield
    except LockNotAvailable:
        raise Locked(
            f"another session has locked the table of the list for more than {TRY_S:g} s:"
            " try again; the view pg_locks shows the session that holds the lock"
        ) from None
    except QueryCanceled:
        raise DeadlineExceeded(
            f"reading the list took more than {LIMIT_S:g} s and was stopped:"
            " ask for fewer rows with limit, or narrow it by another filter",
            retryable=False,
        ) from None
