"""Read and change the table ``outbox`` for operators."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from s2s.store.driver import Cursor
from s2s.store.tables import outbox
from s2s.store.tables.actions import Action
from s2s.store.tables.lists import Listed


@dataclass(frozen=True)
class OutboxEntry:
    """A row of the outbox as operators see it.

    :param due_at: the command's own ``due_at``, in Unix seconds.
    :param error_code: the error of the last attempt, also while the row waits; ``error_message`` is its text.
    :param send_at: the time before which the row is not sent. It also lies in the future while an engine sends the row.
    """

    outbox_id: int
    cmd_type: str
    idem_key: str
    payload: dict[str, Any]
    priority: int
    due_at: int | None
    state: str
    attempts: int
    send_at: datetime
    error_code: str | None
    error_message: str | None
    created_at: datetime


_SELECT: Final = f"select {', '.join(field.name for field in fields(OutboxEntry))} from s2s.outbox"  # noqa: S608

#: Send the row again at once, and notify the relays.
RETRY: Final = Action(
    "retry",
    "s2s.outbox",
    "outbox_id",
    "state",
    ("dead",),
    "with changed as (update s2s.outbox set state = 'waiting', attempts = 0, send_at = now(), error_code = null,"  # noqa: S608
    " error_message = null where outbox_id = any(%(ids)s::bigint[]) returning outbox_id, state)"
    # A trigger may return the old row.
    f" select outbox_id, 'retried', pg_notify('{outbox.CHANNEL}', '') from changed where state = 'waiting'",
)
#: Stop sending the row. Every claim moves ``send_at``: if it was moved, an engine may have sent the row already.
CANCEL: Final = Action(
    "cancel",
    "s2s.outbox",
    "outbox_id",
    "state",
    ("waiting",),
    "with changed as (update s2s.outbox set state = 'dead', error_code = 'cancelled', error_message ="
    " 'an operator cancelled it' where outbox_id = any(%(ids)s::bigint[])"
    " returning outbox_id, state, send_at, created_at)"
    " select outbox_id, case when send_at = created_at then 'cancelled' else 'cancelled_late' end"
    " from changed where state = 'dead'",
)
#: Remove the row.
DISCARD: Final = Action(
    "discard",
    "s2s.outbox",
    "outbox_id",
    "state",
    ("dead",),
    "delete from s2s.outbox where outbox_id = any(%(ids)s::bigint[]) returning outbox_id, 'discarded'",
    "delete",
)


#: Can be filtered by ``state`` and ``cmd_type``.
LISTED: Final = Listed(OutboxEntry, "s2s.outbox", "outbox_id", partial=(("state", "dead"),))


def find(txn: Cursor, outbox_id: int) -> OutboxEntry | None:
    """Return a row, or ``None`` if it does not exist."""
    txn.execute(f"{_SELECT} where outbox_id = %s", (outbox_id,))
    row = txn.fetchone()
    return OutboxEntry(*row) if row else None
