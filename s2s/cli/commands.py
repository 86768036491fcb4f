"""``s2s commands``: what engines pushed."""

from __future__ import annotations

from pathlib import Path

import click

from s2s.cli.common import database_options, json_option, limit_option, one_line_errors, show, transaction
from s2s.store import commands as table


@click.group()
def commands() -> None:
    """Look at the commands that engines pushed."""


@commands.command(name="list")
@click.option("--status", type=click.Choice(("ready", "done", "dead", "cancelled")), help="Only these.")
@limit_option
@database_options
@json_option
@one_line_errors
def list_(status: str | None, limit: int, database: str | None, state_dir: Path, as_json: bool) -> None:
    """List commands, the newest first."""
    with transaction(database, state_dir) as txn:
        found = table.list_commands(txn, status, limit)
    columns = ("cmd_id", "cmd_type", "idem_key", "priority", "status", "attempts", "created_at", "error")
    show(found, columns, as_json, "there are no commands")
