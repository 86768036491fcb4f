"""``s2s db``: the schema."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from s2s.cli.common import database_options, json_option, one_line_errors, show, transaction
from s2s.store import migrations, privileges, sequences
from s2s.store.lock_wait import PATIENCE_S


@click.group()
def db() -> None:
    """Make and check the tables."""


@db.command()
@click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=PATIENCE_S,
    show_default=True,
    help="How long to try again where other sessions hold the locks.",
)
@database_options
@one_line_errors
def migrate(wait_s: float, database: str | None, state_dir: Path) -> None:
    """Bring the tables up to this release. Running it twice, or twice at once, does no harm."""
    with transaction(database, state_dir, is_checked=False) as txn:
        done = migrations.migrate(txn.connection, partial(click.echo, err=True), wait_s)
    for name in done:
        click.echo(f"migrated: {name}")
    if not done:
        click.echo("the database is up to date")


@db.command()
@database_options
@json_option
@one_line_errors
def status(database: str | None, state_dir: Path, as_json: bool) -> None:
    """List the migrations, the privileges that the user lacks and the sequences behind their rows; exit 1 if any is."""
    with transaction(database, state_dir, is_checked=False) as txn:
        found = migrations.status(txn)
        grants = privileges.missing(txn)
        behind = sequences.behind(txn)
    show(found, ("version", "name", "applied_at"), as_json, "this release has no migrations")
    for grant in grants:
        click.echo(f"a privilege is missing, run as the owner of the tables: {grant}", err=True)
    for each in behind:
        click.echo(f"{each}: run: s2s db fix-sequences", err=True)
    if grants or behind or any(each.applied_at is None for each in found):
        raise SystemExit(1)


@db.command(name="fix-sequences")
@database_options
@one_line_errors
def fix_sequences(database: str | None, state_dir: Path) -> None:
    """Set the sequences of ids that stand behind their rows, as after a restore without them."""
    with transaction(database, state_dir, "db.fix_sequences") as txn:
        fixed = sequences.fix(txn)
    for each in fixed:
        click.echo(f"set to {each.largest}: {each}")
    if not fixed:
        click.echo("no sequence stands behind its rows")
