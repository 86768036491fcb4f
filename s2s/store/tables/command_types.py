"""Table ``command_types``: the types that servers have declared. A trigger of the table notifies :data:`CHANNEL`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from s2s.protocol.catalogue.vet import MAX_SIZE
from s2s.store import driver
from s2s.store.driver import Cursor
from s2s.store.kept_rows import note

CHANNEL: Final = "s2s_command_types"
#: The most types that are read, the most recently declared first: each costs a server some KiB of memory.
MOST_TYPES: Final = 1000


def declare(txn: Cursor, schemas: Mapping[str, str]) -> None:
    """Declare the types that a starting server serves.

    :param schemas: the schema of each type, as JSON text. They replace the schemas of an earlier start.
    """
    for cmd_type in sorted(schemas):  # in one order, so that two starting servers cannot deadlock
        txn.execute(
            "insert into s2s.command_types (cmd_type, schema) values (%s, %s)"
            " on conflict (cmd_type) do update set schema = excluded.schema, served_at = now()",
            (cmd_type, schemas[cmd_type]),
        )
        if not txn.rowcount:
            note(txn, "insert or update", "s2s.command_types")


def missing(txn: Cursor, cmd_types: Iterable[str]) -> list[str]:
    """Return the given types that are not in the table."""
    return driver.missing(txn, "s2s.command_types", "cmd_type", cmd_types)


def read(txn: Cursor, cmd_types: Iterable[str] = ()) -> dict[str, str]:
    """Return the schema of each type, as JSON text. A schema that is too long to be used is cut.

    :param cmd_types: types to read in addition to the first :data:`MOST_TYPES`.
    """
    # One character more than the limit, so that the reader can see that the schema is too long.
    row = f"select cmd_type, left(schema, {MAX_SIZE + 1}) from s2s.command_types"  # noqa: S608 - a constant
    txn.execute(
        f"({row} order by served_at desc limit %s) union {row} where cmd_type = any(%s)",
        (MOST_TYPES, list(cmd_types)),
    )
    return dict(txn.fetchall())
