"""``s2s outbox``: commands on their way from an engine to the server."""

from __future__ import annotations

import click

from s2s.cli.actions import add_action
from s2s.cli.common import ROW_ID, before_option, json_option, limit_option, show, show_one, type_option
from s2s.cli.door import Door, rows, with_door
from s2s.errors import OperatorError, Refused
from s2s.operations import outbox as operations


@click.group()
def outbox() -> None:
    """Look after the commands that wait in the outbox to be sent, or that the server refused."""


@outbox.command(name="list")
@click.option("--state", type=click.Choice(("waiting", "dead")), help="Only these.")
@type_option
@before_option("OUTBOX_ID")
@limit_option
@with_door
@json_option
def list_(door: Door, state: str | None, cmd_type: str | None, before: int | None, limit: int, as_json: bool) -> None:
    """List what is in the outbox, the newest first."""
    found = rows(door, operations.LIST, limit, state=state, cmd_type=cmd_type, before=before)
    columns = ("outbox_id", "cmd_type", "idem_key", "state", "attempts", "send_at", "error_code", "error_message")
    show(found, columns, as_json, "there is nothing in the outbox")


@outbox.command(name="show")
@click.argument("outbox_id", type=ROW_ID)
@with_door
@json_option
def show_(door: Door, outbox_id: int, as_json: bool) -> None:
    """Show all of one row, its payload and why it was refused too."""
    try:
        found = door.call(operations.SHOW, where={"outbox_id": outbox_id})
    except Refused as error:
        raise OperatorError(f"{error.message}: see s2s outbox list") from None
    show_one(found, as_json)


add_action(
    outbox,
    "retry",
    "Send dead rows again, now.",
    operations.WORDS,
    "outbox_id",
    operations.RETRY,
    operations.RETRY_DEAD,
    "retried",
)
add_action(outbox, "cancel", "Keep rows that wait from being sent.", operations.WORDS, "outbox_id", operations.CANCEL)
add_action(
    outbox,
    "discard",
    "Remove dead rows.",
    operations.WORDS,
    "outbox_id",
    operations.DISCARD,
    operations.DISCARD_DEAD,
    "discarded",
)
