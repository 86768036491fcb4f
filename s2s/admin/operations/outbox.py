"""Operations on the outbox: commands on their way to the server (docs/protocol.rst, "Outbox and sweep")."""

from __future__ import annotations

from typing import Any, Final

from s2s.admin.operations import rows
from s2s.admin.operations.operation import Operation
from s2s.admin.operations.pages import Page, in_stretches, listing
from s2s.admin.operations.rows import CMD_TYPE, Wording
from s2s.store.tables import actions, outbox_admin
from s2s.store.tables.outbox_admin import OutboxEntry

WORDS: Final = Wording(
    "outbox row",
    {
        "retried": "waits again, to be sent now",
        "cancelled": "cancelled: it will not be sent",
        "cancelled_late": "cancelled, but an engine had it in hand before: the server may have it, or get it yet",
        "discarded": "removed",
    },
    {
        "waiting": ("waits and is sent by itself; to keep it from that", ("cancel",)),
        "dead": ("is dead and is not sent", ("retry", "discard")),
        actions.LOCKED: ("is being settled now: try again", ()),
        actions.KEPT: ("is kept as it is by a trigger or a rule: s2s db status names it", ()),
        actions.MISSING: ("there is none, the server may have it", ()),
    },
)
_PATH: Final = "/v1/outbox"

LIST: Final[Operation[Page[OutboxEntry]]] = listing(
    "list_outbox",
    _PATH,
    "List the rows of the outbox, the newest first",
    OutboxEntry,
    in_stretches(outbox_admin.LISTED),
    filters={"state": {"enum": ["waiting", "dead"]}, "cmd_type": CMD_TYPE},
)
SHOW: Final = rows.show("show_outbox_row", f"{_PATH}/{{outbox_id}}", "outbox_id", WORDS, OutboxEntry, outbox_admin.find)
_RETRY: Final = "Retry {}: dead rows are sent again, now"
_DISCARD: Final = "Discard {}: dead rows are removed"
RETRY: Final = rows.act(outbox_admin.RETRY, _PATH, WORDS, _RETRY)
RETRY_DEAD: Final = rows.act_on_dead(outbox_admin.RETRY, _PATH, WORDS, _RETRY)
CANCEL: Final = rows.act(outbox_admin.CANCEL, _PATH, WORDS, "Cancel {}: waiting rows are not sent")
DISCARD: Final = rows.act(outbox_admin.DISCARD, _PATH, WORDS, _DISCARD)
DISCARD_DEAD: Final = rows.act_on_dead(outbox_admin.DISCARD, _PATH, WORDS, _DISCARD)

OPERATIONS: Final[tuple[Operation[Any], ...]] = (
    LIST, SHOW, *RETRY.both, RETRY_DEAD, *CANCEL.both, *DISCARD.both, DISCARD_DEAD,
)  # fmt: skip
