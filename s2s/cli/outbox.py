"""``s2s outbox``: commands on their way from an engine to the server."""

from __future__ import annotations

from pathlib import Path

import click

from s2s.cli.common import (
    ROW_ID,
    Words,
    add_action,
    database_options,
    json_option,
    limit_option,
    one_line_errors,
    show,
    show_one,
    transaction,
    type_option,
)
from s2s.errors import OperatorError
from s2s.store import actions
from s2s.store import outbox_admin as table

_WORDS = Words(
    "outbox row",
    {
        "retried": "waits again, to be sent now",
        "cancelled": "cancelled: it will not be sent",
        "cancelled_late": "cancelled, but an engine had it in hand before: the server may have it, or get it yet",
        "discarded": "removed",
    },
    {
        "waiting": "waits and is sent by itself; to keep it from that: s2s outbox cancel {id}",
        "dead": "is dead and is not sent: s2s outbox retry {id}, or s2s outbox discard {id}",
        actions.LOCKED: "is being settled now: try again",
        actions.MISSING: "there is none, the server may have it: see s2s outbox list",
    },
)


@click.group()
def outbox() -> None:
    """Look after the commands that wait in the outbox to be sent, or that the server refused."""


@outbox.command(name="list")
@click.option("--state", type=click.Choice(("waiting", "dead")), help="Only these.")
@type_option
@click.option("--before", type=ROW_ID, metavar="OUTBOX_ID", help="Only what is older than this one.")
@limit_option
@database_options
@json_option
@one_line_errors
def list_(
    state: str | None,
    cmd_type: str | None,
    before: int | None,
    limit: int,
    database: str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """List what is in the outbox, the newest first."""
    with transaction(database, state_dir) as txn:
        found = table.list_outbox(txn, state, limit, cmd_type=cmd_type, before=before)
    columns = ("outbox_id", "cmd_type", "idem_key", "state", "attempts", "send_at", "error_code", "error_message")
    show(found, columns, as_json, "there is nothing in the outbox")


@outbox.command(name="show")
@click.argument("outbox_id", type=ROW_ID)
@database_options
@json_option
@one_line_errors
def show_(outbox_id: int, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Show all of one row, its payload and why it was refused too."""
    with transaction(database, state_dir) as txn:
        found = table.find(txn, outbox_id)
    if found is None:
        raise OperatorError(f"there is no outbox row {outbox_id}, the server may have it: see s2s outbox list")
    show_one(found, as_json)


add_action(outbox, "Send dead rows again, now.", table.RETRY, _WORDS, dead="retried")
add_action(outbox, "Keep rows that wait from being sent.", table.CANCEL, _WORDS)
add_action(outbox, "Remove dead rows.", table.DISCARD, _WORDS, dead="discarded")
