"""Reading a JSON value of the database only where a frame can hold it: another hand may have written any size."""

from __future__ import annotations


def jsonb_size(column: str) -> str:
    """Return the SQL of the bytes of a ``jsonb`` column that is not compressed any more, without writing its text.

    A value has up to six times as many bytes as its canonical JSON.
    """
    # Nothing is added; but it is decompressed for that.
    return f"pg_column_size({column} || '{{}}')"


def fitting(column: str) -> str:
    """Return the SQL of a ``jsonb`` column whose canonical JSON may have ``%(longest)s`` bytes; null: it has more.

    A longer one may come through. What sends it knows the size of the frame.
    """
    return f"case when {jsonb_size(column)} <= 8 * %(longest)s then {column} end"
