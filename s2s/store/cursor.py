"""The cursor of our own statements, which psycopg2's process-wide registries do not affect.

A plug-in, or a library that it imports, may call ``register_adapter(list, Json)`` or register a type caster for the
whole process. Our statements write their parameters and read their rows only by the rules below. Foreign code gets
psycopg2's plain cursor (:func:`plain`), with the registries as the plug-in left them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, Final

import orjson
from psycopg2 import _psycopg as c
from psycopg2.extensions import AsIs, Binary, QuotedString, connection, cursor, new_type
from psycopg2.extras import Json

from s2s.errors import CanonicalError
from s2s.protocol.canonical import MAX_DEPTH


class Unreadable:
    """A JSON value of the database that Python cannot read, such as ``1e400``, written by another program.

    It matches no expected type, so that its user rejects it, while the other rows are still read.

    :param why: a sentence for operators.
    """

    def __init__(self, why: str = "") -> None:
        self.why = why

    def __repr__(self) -> str:
        return f"(JSON that cannot be read{f': {self.why}' if self.why else ''})"


#: The beginnings of the parser's reasons, each with the sentence for operators.
_REASONS: Final = {
    "number is infinity": "a number in it is out of range, beyond 1.8e308: say it as a string",
    "depth limit": f"it is nested deeper than {MAX_DEPTH} levels",
}


def read_json(text: str | bytes) -> Any:
    """Read a JSON value of the database."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        said = str(error).partition(":")[0]
        return Unreadable(next((why for begin, why in _REASONS.items() if said.startswith(begin)), said))


def check_readable(value: Any, name: str) -> None:
    """Raise if a JSON value of the database cannot be read.

    :param name: the name of the value, for the error message.
    :raises CanonicalError: the value cannot be read, with the reason.
    """
    if isinstance(value, Unreadable):
        raise CanonicalError(f"the {name} cannot be read: {value.why}")


_JSON: Final = new_type((114, 3802), "S2S_JSON", lambda text, _: None if text is None else read_json(text))


def _read_time(text: str | bytes | None, cur: Any) -> datetime | None:
    """Read a time; one outside Python's range becomes Python's first or last moment, as psycopg2 reads infinity."""
    try:
        time: datetime | None = c.PYDATETIMETZ(text, cur)
    except ValueError:
        end = datetime.min if str(text).endswith("BC") else datetime.max
        time = end.replace(tzinfo=timezone.utc)
    return time


_TIME: Final = new_type(c.PYDATETIMETZ.values, "S2S_TIMESTAMPTZ", _read_time)
#: By type OID: psycopg2's own casters, regardless of those registered for the process, and our caster for JSON.
_CASTERS: Final[dict[int, Any]] = {
    oid: caster
    for caster in (
        *(c.BOOLEAN, c.INTEGER, c.LONGINTEGER, c.FLOAT, c.DECIMAL, c.UNICODE, c.BINARY, c.ROWID),
        *(c.PYDATE, c.PYDATETIME, c.PYTIME, c.PYINTERVAL),
        *(c.BOOLEANARRAY, c.INTEGERARRAY, c.LONGINTEGERARRAY, c.FLOATARRAY, c.DECIMALARRAY, c.UNICODEARRAY),
        *(c.PYDATETIMEARRAY, c.PYDATETIMETZARRAY),
        _JSON,
        _TIME,
    )
    for oid in caster.values
}


class StoreCursor(cursor):
    """A cursor that the registries of the process do not affect.

    :cvar is_ours: its statements are those of this package.
    """

    is_ours = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.string_types = _CASTERS
        # A connection of psycopg2's own class, which an author of handlers may use, lacks this attribute.
        self._is_timed = hasattr(self.connection, "asked_at")

    def execute(self, query: Any, vars: Any = None) -> None:
        """Run a statement; see psycopg2 for the parameters."""
        conn: Any = self.connection
        if self._is_timed:
            conn.asked_at = time.monotonic()
        try:
            super().execute(query, None if vars is None else _literals(vars, conn))
        finally:
            if self._is_timed:
                conn.asked_at = None


def own(txn: cursor) -> StoreCursor:
    """Return a cursor for our own statements in the transaction of any cursor."""
    if isinstance(txn, StoreCursor):
        return txn
    made: StoreCursor = txn.connection.cursor(cursor_factory=StoreCursor)
    return made


def plain(txn: cursor) -> cursor:
    """Return psycopg2's plain cursor in the same transaction, for foreign code."""
    return txn.connection.cursor(cursor_factory=cursor)


# --- parameters ------------------------------------------------------------------------------------------------------


def _literals(values: Any, conn: connection) -> Any:
    if isinstance(values, Mapping):
        return {name: _literal(value, conn) for name, value in values.items()}
    return tuple([_literal(value, conn) for value in values])


def _literal(value: Any, conn: connection) -> Any:
    """Return a value that psycopg2 writes unchanged: ``None``, or an object that quotes itself."""
    write = _WRITERS.get(type(value))
    if write is not None:
        return write(value, conn)
    if isinstance(value, tuple):  # an SQL row
        return AsIs(f"({', '.join(_text(_literal(item, conn)) for item in value)})")
    return value


#: Bound at import: a plug-in may replace ``json.dumps``.
_encode: Final = json.JSONEncoder().encode


def _text(literal: Any) -> str:
    return "null" if literal is None else literal.getquoted().decode()


def _quoted(text: str, conn: connection) -> QuotedString:
    literal = QuotedString(text)
    literal.prepare(conn)
    return literal


def _bytes(value: bytes, conn: connection) -> Any:
    literal = Binary(value)
    literal.prepare(conn)
    return literal


def _array(values: list[Any], conn: connection) -> QuotedString:
    return _quoted(f"{{{','.join([_item(value) for value in values])}}}", conn)


def _item(value: Any) -> str:
    """Return an item of PostgreSQL's text of an array."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, (int, float)):
        return repr(value)
    if not isinstance(value, str):
        raise TypeError(f"an array of {type(value).__name__} cannot be written")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


_WRITERS: Final[dict[type, Callable[[Any, connection], Any]]] = {
    type(None): lambda value, _: None,
    str: _quoted,
    bool: lambda value, _: AsIs("true" if value else "false"),
    # A negative number is written in parentheses, because "--" would begin a comment.
    int: lambda value, _: AsIs(str(value) if value >= 0 else f"({value})"),
    float: lambda value, conn: AsIs(f"'{value!r}'::float8"),
    bytes: _bytes,
    list: _array,
    datetime: lambda value, conn: AsIs(f"'{value.isoformat()}'::timestamptz"),
    Json: lambda value, conn: _quoted(_encode(value.adapted), conn),
}
