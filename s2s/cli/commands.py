"""``s2s commands``: what engines pushed."""

from __future__ import annotations

import click

from s2s.cli.actions import add_action
from s2s.cli.common import ROW_ID, before_option, json_option, limit_option, show, show_one, type_option
from s2s.cli.door import Door, rows, with_door
from s2s.errors import OperatorError, Refused
from s2s.operations import commands as operations


@click.group()
def commands() -> None:
    """Look after the commands that engines pushed."""


@commands.command(name="list")
@click.option("--status", type=click.Choice(("ready", "done", "dead", "cancelled")), help="Only these.")
@type_option
@before_option("CMD_ID")
@limit_option
@with_door
@json_option
def list_(door: Door, status: str | None, cmd_type: str | None, before: int | None, limit: int, as_json: bool) -> None:
    """List commands, the newest first."""
    found = rows(door, operations.LIST, limit, status=status, cmd_type=cmd_type, before=before)
    columns = ("cmd_id", "cmd_type", "idem_key", "priority", "status", "attempts", "created_at", "error")
    show(found, columns, as_json, "there are no commands")


@commands.command(name="show")
@click.argument("cmd_id", type=ROW_ID)
@with_door
@json_option
def show_(door: Door, cmd_id: int, as_json: bool) -> None:
    """Show all of one command, its payload and its last error too."""
    try:
        found = door.call(operations.SHOW, where={"cmd_id": cmd_id})
    except Refused as error:
        raise OperatorError(f"{error.message}: see s2s commands list") from None
    show_one(found, as_json)


add_action(
    commands,
    "retry",
    "Run dead or cancelled commands again, with all their attempts.",
    operations.WORDS,
    "cmd_id",
    operations.RETRY,
    operations.RETRY_DEAD,
    "retried",
)
add_action(commands, "cancel", "Keep commands that wait from being run.", operations.WORDS, "cmd_id", operations.CANCEL)
add_action(
    commands,
    "discard",
    "Remove dead or cancelled commands. A push of the same idem_key stays a duplicate for a while.",
    operations.WORDS,
    "cmd_id",
    operations.DISCARD,
    operations.DISCARD_DEAD,
    "discarded",
)
