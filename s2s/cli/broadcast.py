"""``s2s broadcast``."""

from __future__ import annotations

import json
from typing import Any

import click

from s2s.admin.operations import notices
from s2s.cli.backend import Backend, with_backend
from s2s.cli.common import json_option
from s2s.errors import DbUnavailable, DeadlineExceeded, OperatorError, Refused

SCOPES = ("global", "sector", "corp", "player")


@click.command()
@click.argument("message")
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="global",
    show_default=True,
    help="The group of players that receives it.",
)
@click.option("--sector-id", type=int, help="The sector, with --scope sector.")
@click.option("--corp-id", type=int, help="The corporation, with --scope corp.")
@click.option("--player-id", type=int, help="The player, with --scope player.")
@click.option("--severity", type=click.Choice(("info", "warn", "error")), default="info", show_default=True)
@click.option(
    "--ttl", "ttl_s", type=int, metavar="SECONDS", help="Seconds until it expires; without the option it never does."
)
@with_backend
@json_option
def broadcast(backend: Backend, message: str, as_json: bool, **options: Any) -> None:
    """Send MESSAGE to players: an engine pushes it to the server, which stores it as a notice."""
    try:
        made = backend.call(notices.BROADCAST, body={"message": message, **options})
    except Refused as error:
        if error.code in (DbUnavailable.code, DeadlineExceeded.code):
            raise OperatorError(f"{error.message}: s2s notices") from None
        raise OperatorError(
            f"the broadcast cannot be sent: {error.message.removeprefix('at /body').lstrip('/')}"
        ) from None
    told = f"broadcast {made.broadcast_id} waits for a sweep"
    click.echo(json.dumps({"broadcast_id": made.broadcast_id}) if as_json else told)
    if made.hint:
        click.echo(made.hint, err=True)
