"""Reading a JSON value of the database only where a frame can hold it: another hand may have written any size."""

from __future__ import annotations


def fitting(column: str) -> str:
    """Return the SQL of a ``jsonb`` column of at most ``%(longest)s`` bytes of canonical JSON; null: it has more.

    A value of up to twice that length may come through. What sends it knows the size of the frame.
    """
    # The same value has up to six times the bytes as jsonb. That size is known without reading it.
    return (
        f"case when pg_column_size({column}) <= 8 * %(longest)s then"
        f" case when octet_length({column}::text) <= 2 * %(longest)s then {column} end end"
    )
