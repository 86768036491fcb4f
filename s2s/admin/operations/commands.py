"""Operations on the commands that engines pushed (docs/protocol.rst, "Commands")."""

from __future__ import annotations

from typing import Any, Final

from s2s.admin.operations import rows
from s2s.admin.operations.operation import Operation
from s2s.admin.operations.pages import Page, in_stretches, listing
from s2s.admin.operations.rows import CMD_TYPE, Wording
from s2s.store.driver import Cursor
from s2s.store.tables import actions, commands_admin, retention
from s2s.store.tables.commands_admin import CommandRow

WORDS: Final = Wording(
    "command",
    {
        "retried": "ready again, with all its attempts",
        "cancelled": "cancelled: it will not run",
        "discarded": "removed; its idem_key is kept for a while",
    },
    {
        "ready": ("is ready and runs by itself; to keep it from that", ("cancel",)),
        "done": ("is done: nothing is left to do, and it is removed in time by itself", ()),
        "dead": ("is dead and does not run", ("retry", "discard")),
        "cancelled": ("is cancelled already", ("retry", "discard")),
        actions.LOCKED: ("is running now: try again", ()),
        actions.KEPT: ("is kept as it is by a trigger or a rule: s2s db status names it", ()),
        actions.MISSING: ("there is none", ()),
    },
)
_PATH: Final = "/v1/commands"

LIST: Final[Operation[Page[CommandRow]]] = listing(
    "list_commands",
    _PATH,
    "List commands, the newest first",
    CommandRow,
    in_stretches(commands_admin.LISTED),
    filters={"status": {"enum": ["ready", "done", "dead", "cancelled"]}, "cmd_type": CMD_TYPE},
)
SHOW: Final = rows.show("show_command", f"{_PATH}/{{cmd_id}}", "cmd_id", WORDS, CommandRow, commands_admin.find)
_RETRY: Final = "Retry {}: dead and cancelled commands run again, with all attempts"
_DISCARD: Final = (
    "Discard {}: dead and cancelled commands are removed; a push with the same idem_key stays a duplicate for a while"
)


def _key_days(txn: Cursor) -> dict[str, Any]:
    return {"key_days": retention.keep(txn).key_days}


RETRY: Final = rows.act(commands_admin.RETRY, _PATH, WORDS, _RETRY)
RETRY_DEAD: Final = rows.act_on_dead(commands_admin.RETRY, _PATH, WORDS, _RETRY)
CANCEL: Final = rows.act(commands_admin.CANCEL, _PATH, WORDS, "Cancel {}: waiting commands do not run")
DISCARD: Final = rows.act(commands_admin.DISCARD, _PATH, WORDS, _DISCARD, _key_days)
DISCARD_DEAD: Final = rows.act_on_dead(commands_admin.DISCARD, _PATH, WORDS, _DISCARD, _key_days)

OPERATIONS: Final[tuple[Operation[Any], ...]] = (
    LIST, SHOW, *RETRY.both, RETRY_DEAD, *CANCEL.both, *DISCARD.both, DISCARD_DEAD,
)  # fmt: skip
