"""Table ``outbox``: commands on their way to the server (docs/protocol.rst, "The engine")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from s2s import canonical
from s2s.store.driver import Cursor

CHANNEL: Final = "s2s_outbox"
#: Counting more would take longer than the number is worth.
MOST_COUNTED: Final = 100_000


@dataclass(frozen=True)
class OutboxRow:
    """A command to push.

    :param due_at: the command's own, in Unix seconds.
    :param attempts: how often it was sent before without being settled.
    """

    outbox_id: int
    cmd_type: str
    idem_key: str
    payload: dict[str, Any]
    priority: int
    due_at: int | None
    attempts: int

    def push(self) -> dict[str, Any]:
        """Give the payload of its ``s2s.command.push``."""
        due_at = {} if self.due_at is None else {"due_at": self.due_at}
        return {
            "cmd_type": self.cmd_type,
            "idem_key": self.idem_key,
            "payload": self.payload,
            "priority": self.priority,
            **due_at,
        }


def put(
    txn: Cursor,
    cmd_type: str,
    idem_key: str,
    payload: Mapping[str, Any],
    *,
    priority: int = 100,
    due_at: int | None = None,
) -> int:
    """Emit a command; it is sent once the transaction is committed.

    :param idem_key: the same for the same intention, however often it is emitted.
    :param due_at: Unix seconds before which the server does not run it.
    :returns: its ``outbox_id``.
    :raises CanonicalError: the payload holds what canonical JSON cannot say.
    """
    txn.execute(
        "insert into outbox (cmd_type, idem_key, payload, priority, due_at)"
        " values (%s, %s, %s::jsonb, %s, %s) returning outbox_id",
        (cmd_type, idem_key, canonical.dumps(payload).decode(), priority, due_at),
    )
    return int((txn.fetchone() or ())[0])


def put_batch(txn: Cursor, cmd_type: str, commands: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Emit many commands of one type in one statement.

    :param commands: ``(idem_key, payload)``.
    :raises CanonicalError: a payload holds what canonical JSON cannot say.
    """
    txn.execute(
        "insert into outbox (cmd_type, idem_key, payload)"
        " select %s, idem_key, payload::jsonb from unnest(%s::text[], %s::text[])"
        " with ordinality c (idem_key, payload, place) order by place",
        (cmd_type, [key for key, _ in commands], [canonical.dumps(payload).decode() for _, payload in commands]),
    )


def claim(txn: Cursor, limit: int, lease_s: float, exclude_ids: Sequence[int] = ()) -> list[OutboxRow]:
    """Lease rows to send, the longest waiting first; two relays never get the same row.

    :param lease_s: seconds after which a row that was neither deleted nor retried is anybody's again.
    :param exclude_ids: what the caller still has in flight, should a lease have run out.
    """
    txn.execute(
        "with claimed as (select outbox_id from outbox"
        " where state = 'waiting' and send_at <= now() and not outbox_id = any(%s::bigint[])"
        " order by send_at, outbox_id limit %s for update skip locked)"
        " update outbox o set send_at = now() + %s * interval '1 second' from claimed c where o.outbox_id = c.outbox_id"
        " returning o.outbox_id, o.cmd_type, o.idem_key, o.payload, o.priority, o.due_at, o.attempts",
        (list(exclude_ids), limit, lease_s),
    )
    return sorted((OutboxRow(*row) for row in txn), key=lambda row: row.outbox_id)


def delete(txn: Cursor, outbox_ids: Sequence[int]) -> None:
    """Remove rows that the server has."""
    txn.execute("delete from outbox where outbox_id = any(%s::bigint[])", (list(outbox_ids),))


def retry(txn: Cursor, retries: Sequence[tuple[int, float]]) -> None:
    """Send rows again later.

    :param retries: ``(outbox_id, seconds from now)``.
    """
    txn.execute(
        "update outbox o set attempts = attempts + 1, send_at = now() + r.delay_s * interval '1 second'"
        " from unnest(%s::bigint[], %s::float8[]) r (outbox_id, delay_s) where o.outbox_id = r.outbox_id",
        ([outbox_id for outbox_id, _ in retries], [float(delay_s) for _, delay_s in retries]),
    )


def kill(txn: Cursor, refusals: Sequence[tuple[int, str, str]]) -> None:
    """Set rows aside that the server will never take.

    :param refusals: ``(outbox_id, code, message)``.
    """
    txn.execute(
        "update outbox o set state = 'dead', attempts = attempts + 1, error_code = r.code, error_message = r.message"
        " from unnest(%s::bigint[], %s::text[], %s::text[]) r (outbox_id, code, message)"
        " where o.outbox_id = r.outbox_id",
        tuple(list(column) for column in zip(*refusals, strict=True)) or ([], [], []),
    )


def depth(txn: Cursor) -> int:
    """Count the rows that wait, in flight or not; :data:`MOST_COUNTED` means that many or more."""
    txn.execute("select count(*) from (select from outbox where state = 'waiting' limit %s) waiting", (MOST_COUNTED,))
    return int((txn.fetchone() or (0,))[0])
