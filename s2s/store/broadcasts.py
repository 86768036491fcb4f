"""Table ``broadcasts``: what operators say (docs/protocol.rst, "The engine"). ``insert`` alone makes one."""

from __future__ import annotations

from typing import Any, Final

from s2s.errors import LocalError
from s2s.store import outbox
from s2s.store.driver import Cursor
from s2s.store.own_keys import database_id, own_key

CHANNEL: Final = "s2s_broadcasts"
COMMAND: Final = "notice.publish"

#: The year 9999, in Unix seconds: a timestamp has an end, and ``since_ts`` may lie beyond it.
_LAST_TS: Final = 253_402_300_799
_MEMBERS: Final = ("scope", "sector_id", "corp_id", "player_id", "message", "severity", "ttl_s")


def add(
    txn: Cursor,
    message: str,
    scope: str = "global",
    *,
    sector_id: int | None = None,
    corp_id: int | None = None,
    player_id: int | None = None,
    severity: str = "info",
    ttl_s: int | None = None,
) -> int:
    """Store a broadcast, to be published by the next sweep.

    :param message: 1 to 4000 characters.
    :param ttl_s: seconds that the notice lives; for ever by default.
    :returns: its ``broadcast_id``.
    """
    txn.execute(
        "insert into broadcasts (scope, sector_id, corp_id, player_id, message, severity, ttl_s)"
        " values (%s, %s, %s, %s, %s, %s, %s) returning broadcast_id",
        (scope, sector_id, corp_id, player_id, message, severity, ttl_s),
    )
    return int((txn.fetchone() or ())[0])


def sweep(txn: Cursor, since_ts: int, limit: int, frame_size: int) -> int:
    """Move pending broadcasts into the outbox, each once, whatever sweeps overlap.

    :param since_ts: Unix seconds; what was created before stays pending.
    :param limit: how many at most.
    :param frame_size: the longest frame, in bytes; what needs a longer one is set aside as ``refused``.
    :returns: how many were queued; fewer than ``limit``: there are no more.
    """
    queued = 0
    database = database_id(txn)
    while queued < limit:
        txn.execute(
            f"select broadcast_id, {', '.join(_MEMBERS)} from broadcasts"  # noqa: S608 - constants
            " where state = 'pending' and created_at >= to_timestamp(%s)"
            " order by broadcast_id limit %s for update skip locked",
            (min(since_ts, _LAST_TS), limit - queued),
        )
        found = {row[0]: (own_key(database, "broadcast", row[0]), _payload(row[1:])) for row in txn}
        if not found:
            break
        refused = {number: why for number, command in found.items() if (why := _why_not(*command, frame_size))}
        fitting = [command for number, command in found.items() if number not in refused]
        outbox.put_batch(txn, COMMAND, fitting, frame_size=frame_size)
        txn.execute(
            "update broadcasts b set error = s.error, queued_at = case when s.error is null then now() end,"
            " state = case when s.error is null then 'queued' else 'refused' end"
            " from unnest(%s::bigint[], %s::text[]) s (broadcast_id, error) where b.broadcast_id = s.broadcast_id",
            (list(found), [refused.get(number) for number in found]),
        )
        queued += len(fitting)
    return queued


def _payload(values: tuple[Any, ...]) -> dict[str, Any]:
    return {member: value for member, value in zip(_MEMBERS, values, strict=True) if value is not None}


def _why_not(idem_key: str, payload: dict[str, Any], frame_size: int) -> str | None:
    try:
        outbox.check(COMMAND, idem_key, payload, frame_size)
    except LocalError as error:
        return str(error)
    return None
