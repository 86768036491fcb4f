"""``s2s up``."""

from __future__ import annotations

from pathlib import Path

import click

from s2s.cli.common import one_line_errors, state_dir_option, world_option
from s2s.cli.up import supervisor
from s2s.roles.options import HTTP, LISTEN


@click.command()
@state_dir_option
@click.option("--listen", default=LISTEN, show_default=True, metavar="ENDPOINT", help="Endpoint of the server.")
@click.option("--http", default=HTTP, show_default=True, metavar="ENDPOINT", help="Endpoint of the HTTP API.")
@click.option(
    "--for",
    "for_seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Smoke test: send a broadcast, stop after SECONDS, and exit 0 only if it became a notice.",
)
@world_option
@one_line_errors
def up(state_dir: Path, listen: str, http: str, for_seconds: float | None, no_world: bool) -> None:
    """Run PostgreSQL, a server and an engine with a link, until Ctrl-C."""
    raise SystemExit(supervisor.run(state_dir, listen, http, for_seconds, click.echo, not no_world))
