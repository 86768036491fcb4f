"""``s2s notices``: what players were told."""

from __future__ import annotations

from pathlib import Path

import click

from s2s.cli.common import database_options, json_option, limit_option, one_line_errors, show, transaction
from s2s.store import notices as table


@click.group()
def notices() -> None:
    """Look at the notices that the players were given."""


@notices.command(name="list")
@limit_option
@database_options
@json_option
@one_line_errors
def list_(limit: int, database: str | None, state_dir: Path, as_json: bool) -> None:
    """List notices, the newest first."""
    with transaction(database, state_dir) as txn:
        found = table.list_notices(txn, limit)
    show(found, ("notice_id", "scope", "severity", "message", "created_at"), as_json, "there are no notices")
