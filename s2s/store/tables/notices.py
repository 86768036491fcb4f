"""Table ``notices``: the notices that the command ``notice.publish`` creates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from s2s.store.driver import Cursor, array_literal
from s2s.store.kept_rows import check_written
from s2s.store.tables.lists import Listed

#: The maximum ttl_s, in seconds (a thousand years). A longer one is cut to it, because timestamps have an upper bound.
_LONGEST_TTL_S: Final = 31_556_952_000


@dataclass(frozen=True)
class NoticeRow:
    """A notice as it is shown to operators."""

    notice_id: int
    cmd_id: int
    scope: str
    sector_id: int | None
    corp_id: int | None
    player_id: int | None
    message: str
    severity: str
    created_at: datetime
    expires_at: datetime | None


def insert_batch(txn: Cursor, notices: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """Insert notices in one statement.

    :param notices: ``(cmd_id, payload of notice.publish)``.
    """

    def members(name: str) -> list[Any]:
        return [payload.get(name) for _, payload in notices]

    txn.execute(
        "insert into s2s.notices (cmd_id, scope, sector_id, corp_id, player_id, message, severity, expires_at)"
        " select cmd_id, scope, sector_id, corp_id, player_id, message, severity, now() + ttl_s * interval '1 second'"
        " from unnest(%s::bigint[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::text[],"
        " %s::bigint[]) as n (cmd_id, scope, sector_id, corp_id, player_id, message, severity, ttl_s)",
        (
            array_literal(cmd_id for cmd_id, _ in notices),
            members("scope"),
            *(array_literal(members(name)) for name in ("sector_id", "corp_id", "player_id")),
            members("message"),
            members("severity"),
            array_literal(None if ttl is None else min(ttl, _LONGEST_TTL_S) for ttl in members("ttl_s")),
        ),
    )
    check_written(txn, "insert", "s2s.notices", len(notices))


def exists(txn: Cursor, message: str) -> bool:
    """Return whether there is a notice with this text."""
    txn.execute("select from s2s.notices where message = %s limit 1", (message,))
    return txn.rowcount > 0


LISTED: Final = Listed(NoticeRow, "s2s.notices", "notice_id")
