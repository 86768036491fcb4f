"""``s2s world``: the rows of the bundled world (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Final

import click

from s2s.admin.operations import reports
from s2s.cli.backend import Backend, with_backend
from s2s.cli.common import database_options, json_option, one_line_errors, progress_bar, show_one, transaction
from s2s.cli.world_seed import make_world
from s2s.errors import OperatorError
from s2s.store import migrations
from s2s.world import migrations as world_migrations
from s2s.world.tables import COUNTS

#: The maximum number of rows of a table. This number of ships takes a minute or two, and gigabytes.
_MOST: Final = 10_000_000


@click.group()
def world() -> None:
    """Make a world of sectors, ports and ships, and count its rows."""


@world.command()
@click.option(
    "--sectors", type=click.IntRange(1, _MOST), metavar="N", required=True, help="Number of sectors, each with a port."
)
@click.option(
    "--ships", type=click.IntRange(0, _MOST), metavar="M", required=True, help="Number of ships, in random sectors."
)
@click.option("--seed", type=int, metavar="S", default=1, show_default=True, help="Seed of the random generator.")
@click.option("--replace", is_flag=True, help="Remove the existing world first.")
@database_options
@json_option
@one_line_errors
def seed(
    sectors: int, ships: int, seed: int, replace: bool, database: str | None, state_dir: Path, as_json: bool
) -> None:
    """Make a world: the same sizes and seed make the same world. All of it is made, or nothing."""
    made = {"sectors": sectors, "ports": sectors, "ships": ships, "seed": seed}
    with transaction(database, state_dir) as txn, progress_bar() as bar:
        migrations.check(txn, [world_migrations])
        began = time.monotonic()
        progress = partial(bar.advance, bar.add_task("rows", total=2 * sectors + ships))
        tell = partial(click.echo, err=True)
        if not make_world(txn, sectors, ships, seed, replace=replace, progress=progress, tell=tell):
            raise OperatorError("there is a world already: look at it with: s2s world show; --replace removes it first")
    seconds = round(time.monotonic() - began, 3)
    if as_json:
        click.echo(json.dumps({**made, "seconds": seconds}))
    else:
        click.echo(f"made {sectors} sectors, as many ports and {ships} ships of seed {seed} in {seconds:.2f} s")


@world.command()
@with_backend
@json_option
def show(backend: Backend, as_json: bool) -> None:
    """Count the sectors by their status, the ports and the ships."""
    found = backend.call(reports.operation(COUNTS))
    show_one(found, as_json)
    if not (found.sectors or as_json):
        click.echo("there is no world: make one with: s2s world seed --sectors N --ships M", err=True)
