"""Messages to players: broadcasts, which become notices (docs/protocol.rst, "Outbox and sweep")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from s2s.admin.operations.operation import (
    LONG_BODY_BYTES,
    Operation,
    OperationReply,
    OperationRequest,
    OperationSteps,
    encode,
    run_non_idempotent,
)
from s2s.admin.operations.pages import Page, in_stretches, listing
from s2s.handlers.commands import BUILTIN, registry
from s2s.store.driver import Cursor
from s2s.store.tables import audit, broadcasts, engines, notices
from s2s.store.tables.notices import NoticeRow

_DOCUMENT: Final = registry(BUILTIN)[broadcasts.COMMAND].schema


@dataclass(frozen=True)
class Broadcast:
    """A broadcast that waits for a sweep.

    :param hint: the reason for which no engine sweeps it now, if it is known.
    """

    broadcast_id: int
    hint: str | None = None


_STRANGERS: Final = "no linked engine shares this database: a broadcast is given where the engine's own database is"


def _broadcast(ask: OperationRequest) -> OperationSteps[Broadcast]:
    made = yield from run_non_idempotent(lambda txn: _add(txn, ask.body), "the broadcast was added")
    return OperationReply(made, 201)


def _add(txn: Cursor, body: dict[str, Any]) -> Broadcast:
    broadcast_id = broadcasts.add(txn, **body)
    # No trigger writes this entry, because programs insert thousands of broadcasts in plain SQL.
    audit.write(txn, "broadcasts.add", str(broadcast_id), audit.cut(body, encode(body)))
    return Broadcast(broadcast_id, _STRANGERS if engines.are_strangers(txn) else None)


BROADCAST: Final = Operation(
    "add_broadcast",
    "POST",
    "/v1/broadcasts",
    "operator",
    "Add a broadcast to players: an engine sends it to the server, where it becomes a notice",
    Broadcast,
    _broadcast,
    body={
        **{name: said for name, said in _DOCUMENT.items() if name != "$id"},
        "title": "A broadcast",
    },
    body_bytes=LONG_BODY_BYTES,
    statuses={201: "The broadcast waits for a sweep."},
)
LIST: Final[Operation[Page[NoticeRow]]] = listing(
    "list_notices",
    "/v1/notices",
    "List notices, the newest first",
    NoticeRow,
    in_stretches(notices.LISTED),
)

OPERATIONS: Final[tuple[Operation[Any], ...]] = (BROADCAST, LIST)
