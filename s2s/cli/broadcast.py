"""``s2s broadcast``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from s2s.catalogue.schema import Schema
from s2s.cli.common import database_options, json_option, one_line_errors, transaction
from s2s.commands import BUILTIN, registry
from s2s.errors import OperatorError
from s2s.store import broadcasts

SCOPES = ("global", "sector", "corp", "player")


@click.command()
@click.argument("message")
@click.option("--scope", type=click.Choice(SCOPES), default="global", show_default=True, help="Whom it is for.")
@click.option("--sector-id", type=int, help="The sector, with --scope sector.")
@click.option("--corp-id", type=int, help="The corporation, with --scope corp.")
@click.option("--player-id", type=int, help="The player, with --scope player.")
@click.option("--severity", type=click.Choice(("info", "warn", "error")), default="info", show_default=True)
@click.option("--ttl", "ttl_s", type=int, metavar="SECONDS", help="How long it lives; for ever without it.")
@database_options
@json_option
@one_line_errors
def broadcast(message: str, database: str | None, state_dir: Path, as_json: bool, **said: Any) -> None:
    """Tell the players MESSAGE: the engine takes it to the server, where it becomes a notice."""
    payload = {"message": message, **{name: value for name, value in said.items() if value is not None}}
    wrong = Schema(registry(BUILTIN)[broadcasts.COMMAND].schema).explain(payload, "")
    if wrong is not None:
        raise OperatorError(f"the broadcast cannot be sent: {wrong[0].lstrip('/') or 'it'}: {wrong[1]}")
    with transaction(database, state_dir) as txn:
        broadcast_id = broadcasts.add(txn, **payload)
    click.echo(json.dumps({"broadcast_id": broadcast_id}) if as_json else f"broadcast {broadcast_id} waits for a sweep")
