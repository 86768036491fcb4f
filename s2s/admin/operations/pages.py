"""Operations that list rows page by page (docs/api.rst, "Requests")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Generic, TypeVar

from s2s.admin.operations.operation import (
    Operation,
    OperationReply,
    OperationRequest,
    OperationSteps,
    Rule,
    encode,
    encoded,
)
from s2s.errors import WireError
from s2s.store.driver import Cursor
from s2s.store.tables.lists import Listed, time_limit

T = TypeVar("T")

#: The default and the maximum of the rows of a page.
PAGE_ROWS: Final = 50
MOST_ROWS: Final = 500
#: A page ends early when its rows reach this many bytes of JSON; it always has room for one row.
PAGE_BYTES: Final = 2 << 20
#: Maximum stretches of a table that one request reads for a page, see :data:`s2s.store.tables.lists.STRETCH_ROWS`.
MOST_STRETCHES: Final = 20
#: Rows that one statement reads for a page: for the first statement, and at most. In between, no more rows than fit
#: into the rest of the page if each is as large as the largest one so far.
_FIRST_ROWS: Final = 4
_CHUNK_ROWS: Final = 64


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list.

    :param next_cursor: the ``cursor`` of the request for the next page; ``None``: this is the last page. A page without
        items may have one, since a filter may skip more rows than one request reads.
    """

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True)
class _Read(Page[T]):
    """A part of a list, as a step has read it in a thread.

    :param encoded: the JSON of each item.
    """

    encoded: list[bytes]

    @property
    def size(self) -> int:
        """The size of all items, in bytes of JSON."""
        return sum(map(len, self.encoded))


def _reply(part: _Read[T]) -> OperationReply[Page[T]]:
    """Return the reply with a part of a list. It reuses the JSON of the items: encoding takes some milliseconds."""
    body = encode(Page([encoded(row) for row in part.encoded], part.next_cursor))
    return OperationReply(Page(part.items, part.next_cursor), body=body)


#: The schema of a cursor that is the number of the page's last row.
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
) -> _Read[T]:
    """Read one page: up to ``limit`` rows, fewer if they are long.

    :param read: returns the first rows after a cursor: ``read(limit=, before=)``.
    :param cursor_of: returns the cursor for the rows after a row.
    :param room: the bytes of JSON after which the page ends; :data:`PAGE_BYTES` if left out.
    """
    items: list[T] = []
    parts: list[bytes] = []
    size, room = 0, PAGE_BYTES if room is None else room
    most, largest = _FIRST_ROWS, 1
    while True:
        wanted = min(most, _CHUNK_ROWS, limit + 1 - len(items))
        rows = read(limit=wanted, before=cursor)
        for row in rows:
            if len(items) == limit or size >= room:
                return _Read(items, cursor, parts)
            items.append(row)
            parts.append(encode(row))
            size += len(parts[-1])
            largest = max(largest, len(parts[-1]))
            cursor = cursor_of(row)
        if len(rows) < wanted:
            return _Read(items, None, parts)
        most = min(4 * most, 1 + max(0, room - size) // largest)


def _paged(
    work: Callable[[Cursor, OperationRequest], _Read[T]],
) -> Callable[[OperationRequest], OperationSteps[Page[T]]]:
    """Make the steps of a list from one function, which reads a page."""

    def begin(ask: OperationRequest) -> OperationSteps[Page[T]]:
        part: _Read[T] = yield partial(step, ask)
        return _reply(part)

    def step(ask: OperationRequest, txn: Cursor) -> _Read[T]:
        with time_limit(txn):
            return work(txn, ask)

    return begin


def paged(
    read: Callable[..., list[T]], cursor_of: Callable[[T], str]
) -> Callable[[OperationRequest], OperationSteps[Page[T]]]:
    """Make the steps of a list.

    :param read: returns the first rows after a cursor: ``read(txn, **filters, limit=, before=)``.
    :param cursor_of: returns the value of ``before`` for the rows after a row.
    """

    def work(txn: Cursor, ask: OperationRequest) -> _Read[T]:
        filters = dict(ask.query)
        limit, after = filters.pop("limit"), filters.pop("cursor", None)
        return page(partial(read, txn, **filters), cursor_of, limit, after)

    return _paged(work)


def in_stretches(listed: Listed[T]) -> Callable[[OperationRequest], OperationSteps[Page[T]]]:
    """Make the steps of a list whose filters may skip many rows. The rows of a step and the steps are limited."""

    def begin(ask: OperationRequest) -> OperationSteps[Page[T]]:
        filters = dict(ask.query)
        limit, cursor = filters.pop("limit"), filters.pop("cursor", None)
        items: list[T] = []
        parts: list[bytes] = []
        size = 0
        for _ in range(MOST_STRETCHES):
            step = partial(stretch, filters, limit - len(items), cursor, PAGE_BYTES - size)
            part: _Read[T] = yield step
            items += part.items
            parts += part.encoded
            cursor = part.next_cursor
            size += part.size
            if cursor is None or len(items) == limit or size >= PAGE_BYTES:
                break
        return _reply(_Read(items, cursor, parts))

    def stretch(filters: dict[str, Any], limit: int, cursor: str | None, room: int, txn: Cursor) -> _Read[T]:
        with time_limit(txn):
            floor = listed.floor(txn, None if cursor is None else int(cursor), **filters)
            read = partial(listed.read, txn, floor=floor, **filters)
            part = page(read, lambda row: str(getattr(row, listed.key)), limit, cursor, room)
        return part if part.next_cursor or floor is None else replace(part, next_cursor=str(floor))

    return begin


def listing(
    name: str,
    path: str,
    summary: str,
    row: type[T],
    begin: Callable[[OperationRequest], OperationSteps[Page[T]]],
    *,
    filters: Mapping[str, Rule] | None = None,
    cursor: Rule = NUMBER,
    refusals: tuple[type[WireError], ...] = (),
) -> Operation[Page[T]]:
    """Declare an operation that lists rows page by page.

    :param filters: the schemas of the filters, by name.
    """
    limit = {
        "type": "integer",
        "minimum": 1,
        "maximum": MOST_ROWS,
        "default": PAGE_ROWS,
        "description": "Maximum rows of the page; a page with long rows has fewer.",
    }
    query = {**(filters or {}), "limit": limit, "cursor": cursor}
    kind: Any = Page[row]  # type: ignore[valid-type]
    return Operation(name, "GET", path, "observer", summary, kind, begin, query=query, refusals=refusals, is_list=True)


def after_key(rows: Sequence[T], key: Callable[[T], str], limit: int, before: str | None) -> list[T]:
    """Return the first rows whose key follows a cursor, from a short list that was read as a whole."""
    ordered = sorted(rows, key=key)
    return [row for row in ordered if before is None or key(row) > before][:limit]


def keyed(
    read: Callable[[Cursor], Sequence[T]], key: Callable[[T], str]
) -> Callable[[OperationRequest], OperationSteps[Page[T]]]:
    """Make the steps of a short list, which is read as a whole and ordered by a key."""

    def work(txn: Cursor, ask: OperationRequest) -> _Read[T]:
        rows = read(txn)
        return page(partial(after_key, rows, key), key, ask.query["limit"], ask.query.get("cursor"))

    return _paged(work)


#: The schema of a cursor that is the key of the page's last row.
KEY: Final = {"type": "string", "maxLength": 500, "description": "The next_cursor of the page before."}
