"""Table ``broadcasts``: notices from operators (docs/protocol.rst, "Outbox and sweep"). SQL can insert one, too."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from s2s.errors import LocalError, StatementRefused
from s2s.store.driver import Cursor, refusable
from s2s.store.kept_rows import check_written, refusal
from s2s.store.tables import outbox
from s2s.store.tables.own_keys import database_id, digest, own_key

CHANNEL: Final = "s2s_broadcasts"
COMMAND: Final = "notice.publish"

#: The year 9999, in Unix seconds: a PostgreSQL timestamp has a maximum, and ``since_ts`` may lie beyond it.
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
    """Store a broadcast; the next sweep publishes it.

    :param message: 1 to 4000 characters.
    :param ttl_s: lifetime of the notice, in seconds; without end by default.
    :returns: its ``broadcast_id``.
    """
    txn.execute(
        "insert into s2s.broadcasts (scope, sector_id, corp_id, player_id, message, severity, ttl_s)"
        " values (%s, %s, %s, %s, %s, %s, %s) returning broadcast_id",
        (scope, sector_id, corp_id, player_id, message, severity, ttl_s),
    )
    check_written(txn, "insert", "s2s.broadcasts")
    return int((txn.fetchone() or ())[0])


def sweep(txn: Cursor, since_ts: int, limit: int, frame_size: int) -> int:
    """Move pending broadcasts into the outbox, each exactly once even if sweeps overlap.

    :param since_ts: Unix seconds; a broadcast created before stays pending. 0: no limit.
    :param limit: the most broadcasts to move.
    :param frame_size: the longest frame, in bytes. A broadcast that needs a longer one is marked ``refused``.
    :returns: how many were queued; fewer than ``limit``: there are no more.
    :raises StatementRefused: the database refuses all remaining broadcasts.
    """
    queued = last = 0
    database = database_id(txn)
    kept: StatementRefused | None = None
    while queued < limit:
        txn.execute(
            f"select broadcast_id, (created_at at time zone 'utc')::text, {', '.join(_MEMBERS)}"  # noqa: S608 - constants
            " from s2s.broadcasts"
            " where state = 'pending' and broadcast_id > %s"
            " and created_at >= coalesce(to_timestamp(nullif(%s, 0)), '-infinity')"
            " order by broadcast_id limit %s for update skip locked",
            (last, min(since_ts, _LAST_TS), limit - queued),
        )
        found = {row[0]: (own_key(database, "broadcast", row[0], digest(*row[1:])), _payload(row[2:])) for row in txn}
        if not found:
            break
        last = max(found)
        try:
            with refusable(txn):
                queued += _queue(txn, found, frame_size)
        except StatementRefused as refused:
            kept = refused
            # The database refuses one of them, so write each one by itself.
            for number, command in found.items():
                with suppress(StatementRefused), refusable(txn):
                    queued += _queue(txn, {number: command}, frame_size)
    if kept is not None and not queued:
        raise kept
    return queued


def _queue(txn: Cursor, found: Mapping[int, tuple[str, dict[str, Any]]], frame_size: int) -> int:
    """Move some broadcasts into the outbox, or mark them as refused; return how many were moved."""
    refused = {number: why for number, command in found.items() if (why := _why_not(*command, frame_size))}
    fitting = [command for number, command in found.items() if number not in refused]
    outbox.put_batch(txn, COMMAND, fitting, frame_size=frame_size)
    txn.execute(
        "update s2s.broadcasts b set error = s.error, queued_at = case when s.error is null then now() end,"
        " state = case when s.error is null then 'queued' else 'refused' end"
        " from unnest(%s::bigint[], %s::text[]) s (broadcast_id, error) where b.broadcast_id = s.broadcast_id"
        " returning b.state <> 'pending'",
        (list(found), [refused.get(number) for number in found]),
    )
    # A trigger may return null or the old row.
    if sum(is_written for (is_written,) in txn.fetchall()) < len(found):
        raise refusal(txn, "update", "s2s.broadcasts")
    # Run deferred constraints and triggers now, so that their errors are caught here.
    txn.execute("set constraints all immediate")
    return len(fitting)


def _payload(values: tuple[Any, ...]) -> dict[str, Any]:
    return {member: value for member, value in zip(_MEMBERS, values, strict=True) if value is not None}


def _why_not(idem_key: str, payload: dict[str, Any], frame_size: int) -> str | None:
    try:
        outbox.check(COMMAND, idem_key, payload, frame_size)
    except LocalError as error:
        return str(error)
    return None
