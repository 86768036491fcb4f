"""``s2s db``: the database schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click

from s2s.cli.common import database_options, json_option, one_line_errors, show, transaction, world_option
from s2s.errors import SchemaError
from s2s.handlers.discovery import Found, installed
from s2s.store import kept_rows, migrations, privileges, sequences, shape
from s2s.store.driver import Cursor
from s2s.store.lock_wait import PATIENCE_S
from s2s.store.migrations import Migrations
from s2s.store.monitors import guard_watch, notify_queue
from s2s.store.tables import own_keys


@click.group()
def db() -> None:
    """Create, upgrade and check the tables."""


@db.command()
@click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=PATIENCE_S,
    show_default=True,
    help="Seconds for which a migration is tried again while other sessions hold its locks.",
)
@world_option
@database_options
@one_line_errors
def migrate(wait_s: float, no_world: bool, database: str | None, state_dir: Path) -> None:
    """Apply the migrations of s2s and of the plug-ins. It is safe to run twice, also at once.

    A plug-in that is left out is reported in a line, its tables do not change, and the exit code is 1.
    """
    found = _plugins(no_world)
    plugins, tell = list(found.migrations.values()), partial(click.echo, err=True)
    with transaction(database, state_dir, is_checked=False) as txn, privileges.explained(txn, plugins):
        done = migrations.migrate(txn.connection, plugins, found.settings.values(), tell=tell, patience_s=wait_s)
    for name in done:
        click.echo(f"migrated: {name}")
    if not done:
        click.echo("the database is up to date")
    if found.complaints:
        raise SystemExit(1)


def _plugins(no_world: bool) -> Found:
    """Return the installed plug-ins, and write a line for each that is left out."""
    found = installed(not no_world)
    for complaint in found.complaints:
        click.echo(complaint, err=True)
    return found


@db.command()
@world_option
@database_options
@json_option
@one_line_errors
def status(no_world: bool, database: str | None, state_dir: Path, as_json: bool) -> None:
    """List the migrations, and each problem of a role or a migration; exit 1 if there is any."""
    is_whole = True
    plugins = list(_plugins(no_world).migrations.values())
    with transaction(database, state_dir, is_checked=False) as txn:
        for line in _wrong(txn, plugins):
            click.echo(line, err=True)
            is_whole = False
        is_visible = migrations.is_visible(txn)
        for guard in [*kept_rows.foreign(txn, migrations.tables()), *shape.foreign(txn)] if is_visible else ():
            click.echo(f"s2s has not made the {guard}; to remove it: {guard.cure}", err=True)
        found = migrations.status(txn, plugins)
        # The line is not a problem: a role starts. With a problem above, the tables that the line needs may be missing.
        if is_whole and all(each.applied_at for each in found) and (line := own_keys.copied(txn)):
            click.echo(line, err=True)
    show(found, ("schema", "version", "name", "applied_at"), as_json, "this release has no migrations")
    if not is_whole or any(each.applied_at is None for each in found):
        raise SystemExit(1)


def _wrong(txn: Cursor, plugins: Sequence[Migrations]) -> Iterator[str]:
    """Return a line with its fix for each problem; problems whose fix needs the fewest privileges come first."""
    for grant in privileges.missing(txn, plugins):
        yield f"a privilege is missing, run as the owner of the tables: {grant}"
    yield from privileges.hidden(txn)
    if migrations.is_visible(txn):
        yield from (line for line, _ in sequences.wrong(txn))
        yield from shape.wrong(txn)
        _, kept = guard_watch.look(txn)
        yield from kept
    queue = notify_queue.look(txn)
    if queue.usage >= notify_queue.HIGH:
        yield str(queue)
    not_allowed = privileges.to_migrate(txn, plugins)
    yield from not_allowed
    if not not_allowed:
        try:
            migrations.check(txn, plugins)
        except SchemaError as error:
            yield str(error)


@db.command(name="fix-sequences")
@database_options
@one_line_errors
def fix_sequences(database: str | None, state_dir: Path) -> None:
    """Advance each id sequence that is behind the largest id of its table, as after a restore without sequences."""
    is_fixed = False
    with transaction(database, state_dir, "db.fix_sequences") as txn:
        for each in sequences.fix(txn.connection, partial(click.echo, err=True)):
            click.echo(f"set to {each.largest}: {each}")
            is_fixed = True
    if not is_fixed:
        click.echo("no sequence is behind its table")


@db.command(name="fix-id")
@click.option("--new", "choice", flag_value="new", help="Make a new id: the original database still exists.")
@click.option(
    "--keep", "choice", flag_value="keep", help="Keep the id: the original database no longer exists, or was moved."
)
@database_options
@one_line_errors
def fix_id(choice: str | None, database: str | None, state_dir: Path) -> None:
    """Give a copy of a database an id of its own, or keep its id after a restore or a move.

    The id is part of the keys of commands. Two databases with one id must not push to one server.
    """
    if choice is None:
        raise click.UsageError("name one of --new and --keep")
    with transaction(database, state_dir, "db.fix_id") as txn:
        if choice == "new":
            old, new = own_keys.renew(txn)
            told = f"the id of the database is {new}; keys made before keep the old id {old}"
        else:
            told = f"the id of the database stays {own_keys.keep(txn)}"
    click.echo(told)
