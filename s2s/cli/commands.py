"""``s2s commands``: what engines pushed."""

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
from s2s.store import actions, retention
from s2s.store import commands_admin as table

_WORDS = Words(
    "command",
    {
        "retried": "ready again, with all its attempts",
        "cancelled": "cancelled: it will not run",
        "discarded": "removed; its idem_key is kept for a while",
    },
    {
        "ready": "is ready and runs by itself; to keep it from that: s2s commands cancel {id}",
        "done": "is done: nothing is left to do, and it is removed in time by itself",
        "dead": "is dead and does not run: s2s commands retry {id}, or s2s commands discard {id}",
        "cancelled": "is cancelled already: s2s commands retry {id}, or s2s commands discard {id}",
        actions.LOCKED: "is running now: try again",
        actions.MISSING: "there is none: see s2s commands list",
    },
)


@click.group()
def commands() -> None:
    """Look after the commands that engines pushed."""


@commands.command(name="list")
@click.option("--status", type=click.Choice(("ready", "done", "dead", "cancelled")), help="Only these.")
@type_option
@click.option("--before", type=ROW_ID, metavar="CMD_ID", help="Only what is older than this one.")
@limit_option
@database_options
@json_option
@one_line_errors
def list_(
    status: str | None,
    cmd_type: str | None,
    before: int | None,
    limit: int,
    database: str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """List commands, the newest first."""
    with transaction(database, state_dir) as txn:
        found = table.list_commands(txn, status, limit, cmd_type=cmd_type, before=before)
    columns = ("cmd_id", "cmd_type", "idem_key", "priority", "status", "attempts", "created_at", "error")
    show(found, columns, as_json, "there are no commands")


@commands.command(name="show")
@click.argument("cmd_id", type=ROW_ID)
@database_options
@json_option
@one_line_errors
def show_(cmd_id: int, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Show all of one command, its payload and its last error too."""
    with transaction(database, state_dir) as txn:
        found = table.find(txn, cmd_id)
    if found is None:
        raise OperatorError(f"there is no command {cmd_id}: see s2s commands list")
    show_one(found, as_json)


add_action(
    commands,
    "Run dead or cancelled commands again, with all their attempts.",
    table.RETRY,
    _WORDS,
    dead="retried",
)
add_action(commands, "Keep commands that wait from being run.", table.CANCEL, _WORDS)
add_action(
    commands,
    "Remove dead or cancelled commands. A push of the same idem_key stays a duplicate for a while.",
    table.DISCARD,
    _WORDS,
    dead="discarded",
    params=lambda txn: {"key_days": retention.keep(txn).key_days},
)
