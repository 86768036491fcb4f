"""``s2s commands``: commands that engines pushed."""

from __future__ import annotations

import click

from s2s.admin.operations import commands
from s2s.cli.actions import add_action
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import ROW_ID, before_option, json_option, limit_option, show, show_one, type_option
from s2s.errors import OperatorError, Refused


@click.group("commands")
def group() -> None:
    """List, show, retry and cancel the commands that engines pushed."""


@group.command(name="list")
@click.option(
    "--status", type=click.Choice(("ready", "done", "dead", "cancelled")), help="Show only commands of this status."
)
@type_option
@before_option("CMD_ID")
@limit_option
@with_backend
@json_option
def list_(
    backend: Backend, status: str | None, cmd_type: str | None, before: int | None, limit: int, as_json: bool
) -> None:
    """List commands, the newest first."""
    found = rows(backend, commands.LIST, limit, status=status, cmd_type=cmd_type, before=before)
    columns = ("cmd_id", "cmd_type", "idem_key", "priority", "status", "attempts", "created_at", "error")
    show(found, columns, as_json, "there are no commands")


@group.command(name="show")
@click.argument("cmd_id", type=ROW_ID)
@with_backend
@json_option
def show_(backend: Backend, cmd_id: int, as_json: bool) -> None:
    """Show all of one command, with its payload and its last error."""
    try:
        found = backend.call(commands.SHOW, path_params={"cmd_id": cmd_id})
    except Refused as error:
        raise OperatorError(f"{error.message}: see s2s commands list") from None
    show_one(found, as_json)


add_action(
    group,
    "retry",
    "Run dead or cancelled commands again, with all their attempts.",
    commands.WORDS,
    "cmd_id",
    commands.RETRY,
    commands.RETRY_DEAD,
    "retried",
)
add_action(group, "cancel", "Keep commands that wait from being run.", commands.WORDS, "cmd_id", commands.CANCEL)
add_action(
    group,
    "discard",
    "Remove dead or cancelled commands. A push of the same idem_key stays a duplicate for a while.",
    commands.WORDS,
    "cmd_id",
    commands.DISCARD,
    commands.DISCARD_DEAD,
    "discarded",
)
