"""Lists, page by page (docs/api.rst, "Requests")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

from s2s.admin.operations.operation import Operation, OperationRequest, Reply, Rule, Steps, encode, once
from s2s.errors import WireError
from s2s.store.driver import Cursor
from s2s.store.tables.lists import Listed, time_limit

T = TypeVar("T")

#: Rows of a page, where nobody says how many, and at most.
PAGE_ROWS: Final = 50
MOST_ROWS: Final = 500
#: A page ends early when its rows have so many bytes of JSON; one row always fits.
PAGE_BYTES: Final = 2 << 20
#: Stretches of a table that one request looks through for a page, see :data:`s2s.store.tables.lists.STRETCH_ROWS`.
MOST_STRETCHES: Final = 20
#: Rows that are read at once for a page.
_CHUNK_ROWS: Final = 64


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list.

    :param next_cursor: ask with this one as ``cursor`` for what follows, also where there are no items, since a filter
        may pass over more rows than one request looks at; ``None``: nothing follows.
    """

    items: list[T]
    next_cursor: str | None


#: A cursor that is the number of the page's last row.
NUMBER: Final = {
    "type": "string",
    "pattern": "^[1-9][0-9]{0,17}$",
    "description": "The next_cursor of the page before.",
}


def page(
    read: Callable[..., list[T]],
    cursor_of: Callable[[T], str],
    limit: int,
    cursor: str | None,
    room: int | None = None,
) -> Page[T]:
    """Read one page: so many rows, fewer where they are long, and whether there are more.

    :param read: gives the first rows after a cursor: ``read(limit=, before=)``.
    :param room: bytes of JSON after which it ends; :data:`PAGE_BYTES` if left out.
    """
    items: list[T] = []
    size, room = 0, PAGE_BYTES if room is None else room
    while True:
        wanted = min(_CHUNK_ROWS, limit + 1 - len(items))
        rows = read(limit=wanted, before=cursor)
        for row in rows:
            if len(items) == limit or size >= room:
                return Page(items, cursor)
            items.append(row)
            size += len(encode(row))
            cursor = cursor_of(row)
        if len(rows) < wanted:
            return Page(items, None)


def paged(read: Callable[..., list[T]], cursor_of: Callable[[T], str]) -> Callable[[OperationRequest], Steps[Page[T]]]:
    """Make the steps of a list.

    :param read: gives the first rows after a cursor: ``read(txn, **filters, limit=, before=)``.
    :param cursor_of: gives what ``before`` is to be for the rows that follow this one.
    """

    def work(txn: Cursor, ask: OperationRequest) -> Page[T]:
        filters = dict(ask.query)
        limit, after = filters.pop("limit"), filters.pop("cursor", None)
        with time_limit(txn):
            return page(partial(read, txn, **filters), cursor_of, limit, after)

    return once(work)


def in_stretches(listed: Listed[T]) -> Callable[[OperationRequest], Steps[Page[T]]]:
    """Make the steps of a list whose filters may pass over many rows: a bounded number in each, and of steps."""

    def begin(ask: OperationRequest) -> Steps[Page[T]]:
        filters = dict(ask.query)
        limit, cursor = filters.pop("limit"), filters.pop("cursor", None)
        items: list[T] = []
        size = 0
        for _ in range(MOST_STRETCHES):
            step = partial(stretch, filters, limit - len(items), cursor, PAGE_BYTES - size)
            part: Page[T] = yield step
            items += part.items
            cursor = part.next_cursor
            size += sum(len(encode(row)) for row in part.items)
            if cursor is None or len(items) == limit or size >= PAGE_BYTES:
                break
        return Reply(Page(items, cursor))

    def stretch(filters: dict[str, Any], limit: int, cursor: str | None, room: int, txn: Cursor) -> Page[T]:
        with time_limit(txn):
            floor = listed.floor(txn, None if cursor is None else int(cursor), **filters)
            read = partial(listed.read, txn, floor=floor, **filters)
            part = page(read, lambda row: str(getattr(row, listed.key)), limit, cursor, room)
        return part if part.next_cursor or floor is None else Page(part.items, str(floor))

    return begin


def listing(
    name: str,
    path: str,
    summary: str,
    row: type[T],
    begin: Callable[[OperationRequest], Steps[Page[T]]],
    *,
    filters: Mapping[str, Rule] | None = None,
    cursor: Rule = NUMBER,
    refusals: tuple[type[WireError], ...] = (),
) -> Operation[Page[T]]:
    """Declare an operation that lists rows, page by page.

    :param filters: the schemas of what narrows the list.
    """
    limit = {
        "type": "integer",
        "minimum": 1,
        "maximum": MOST_ROWS,
        "default": PAGE_ROWS,
        "description": "Rows of a page at most; one with long rows ends earlier.",
    }
    query = {**(filters or {}), "limit": limit, "cursor": cursor}
    kind: Any = Page[row]  # type: ignore[valid-type]
    return Operation(name, "GET", path, "observer", summary, kind, begin, query=query, refusals=refusals, is_list=True)


def after_key(rows: Sequence[T], key: Callable[[T], str], limit: int, before: str | None) -> list[T]:
    """Cut from a short list that is read as a whole: the first rows whose key follows a cursor."""
    ordered = sorted(rows, key=key)
    return [row for row in ordered if before is None or key(row) > before][:limit]


def keyed(
    read: Callable[[Cursor], Sequence[T]], key: Callable[[T], str]
) -> Callable[[OperationRequest], Steps[Page[T]]]:
    """Make the steps of a short list, which is read as a whole and ordered by a key."""

    def work(txn: Cursor, limit: int, before: str | None) -> list[T]:
        return after_key(read(txn), key, limit, before)

    return paged(work, key)


#: A cursor that is the key of the page's last row.
KEY: Final = {"type": "string", "maxLength": 500, "description": "The next_cursor of the page before."}
