"""A command type with a countable effect: it works in two halves, and fails between them if its payload says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from campaigns.faults.checker import CMD_TYPE
from s2s.handlers.commands import CommandHandler
from s2s.store.driver import Cursor
from s2s.store.tables.commands import Command

#: The table of its effects, without a constraint that would prevent a second effect.
TABLE = (
    "create table public.effects (idem_key text not null, half integer not null,"
    " at float8 not null default extract(epoch from clock_timestamp()))"
)


class Mark(CommandHandler):
    """Inserts a row for each half of its work."""

    cmd_type = CMD_TYPE
    schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"fails": {"type": "integer"}},
        "required": ["fails"],
    }

    def run(self, txn: Cursor, command: Command) -> None:
        """Do both halves; in the first ``fails`` attempts of the payload, do the first half and fail."""
        txn.execute("insert into public.effects (idem_key, half) values (%s, 1)", (command.idem_key,))
        if command.attempts < command.payload["fails"]:
            raise ValueError("it is told to fail")
        txn.execute("insert into public.effects (idem_key, half) values (%s, 2)", (command.idem_key,))


mark = Mark()
