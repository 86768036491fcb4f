"""Read a JSON value only if a frame can hold it: a value that another program has written may have any size."""

from __future__ import annotations


def jsonb_size(column: str) -> str:
    """Return the SQL expression for the size of a ``jsonb`` column, uncompressed, in bytes, without writing its text.

    A value has up to six times as many bytes as its canonical JSON.
    """
    # The concatenation adds nothing, but it decompresses the value.
    return f"pg_column_size({column} || '{{}}')"


def fitting(column: str) -> str:
    """Return the SQL expression of a ``jsonb`` column; null if its canonical JSON has more than ``%(longest)s`` bytes.

    The check is coarse: a longer value may pass. The sender checks the frame size.
    """
    return f"case when {jsonb_size(column)} <= 8 * %(longest)s then {column} end"
