"""Read and change the table ``commands`` for operators."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from s2s.store.driver import Cursor
from s2s.store.tables import retention
from s2s.store.tables.actions import Action
from s2s.store.tables.lists import Listed


@dataclass(frozen=True)
class CommandRow:
    """A command as operators see it."""

    cmd_id: int
    cmd_type: str
    idem_key: str
    payload: dict[str, Any]
    priority: int
    due_at: datetime
    status: str
    attempts: int
    deaths: int
    error: str | None
    created_at: datetime
    finished_at: datetime | None


_SELECT: Final = f"select {', '.join(field.name for field in fields(CommandRow))} from s2s.commands"  # noqa: S608

#: Run the command again, with all its attempts. The last error stays visible until the command runs.
RETRY: Final = Action(
    "retry",
    "s2s.commands",
    "cmd_id",
    "status",
    ("dead", "cancelled"),
    "update s2s.commands set status = 'ready', attempts = 0, deaths = 0, runs_alone = null, stops = null,"
    " due_at = now(), due_is_ours = true, finished_at = null"
    " where cmd_id = any(%(ids)s::bigint[]) returning cmd_id, 'retried'",
)
#: Never run the command. A command that a worker has claimed but not locked yet is not run any more.
CANCEL: Final = Action(
    "cancel",
    "s2s.commands",
    "cmd_id",
    "status",
    ("ready",),
    "update s2s.commands set status = 'cancelled', finished_at = now()"
    " where cmd_id = any(%(ids)s::bigint[]) returning cmd_id, 'cancelled'",
)
#: Remove the command. Its key is kept for ``key_days`` days.
DISCARD: Final = Action(
    "discard",
    "s2s.commands",
    "cmd_id",
    "status",
    ("dead", "cancelled"),
    retention.REMOVE,
    "delete",
    retention.note_keys,
)


#: Can be filtered by ``status`` and ``cmd_type``.
LISTED: Final = Listed(CommandRow, "s2s.commands", "cmd_id", partial=(("status", "dead"), ("status", "cancelled")))


def find(txn: Cursor, cmd_id: int) -> CommandRow | None:
    """Return a command, or ``None`` if it does not exist."""
    txn.execute(f"{_SELECT} where cmd_id = %s", (cmd_id,))
    row = txn.fetchone()
    return CommandRow(*row) if row else None
