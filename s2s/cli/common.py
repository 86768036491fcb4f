"""What the commands share: where the database is, how errors end, how rows are shown."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2s import preflight
from s2s.errors import S2SError
from s2s.store import migrations
from s2s.store.driver import Cursor
from s2s.store.pool import blocking

F = TypeVar("F", bound=Callable[..., Any])

state_dir_option = click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=preflight.STATE_DIR,
    show_default=True,
    envvar="S2S_STATE_DIR",
    help="Where the embedded PostgreSQL lives, when no database is named.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="The newest so many."
)


def database_options(function: F) -> F:
    """Add the options that say where the database is."""
    named = click.option(
        "--database", metavar="URL", help=f"PostgreSQL URL, or @FILE; else {preflight.DATABASE_VARIABLE}."
    )
    return named(state_dir_option(function))


def one_line_errors(function: F) -> F:
    """End with one line and exit code 1 where something is wrong that the operator can mend."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except S2SError as error:
            raise click.ClickException(str(error)) from None
        except UnicodeEncodeError:
            raise click.ClickException("an argument is not UTF-8: type it in a UTF-8 terminal") from None

    return wrapped  # type: ignore[return-value]


@contextmanager
def transaction(database: str | None, state_dir: Path, *, is_checked: bool = True) -> Iterator[Cursor]:
    """Give one transaction on the database: the one named, the environment's, or the embedded one.

    :param is_checked: refuse a schema that is not ours.
    """
    place = preflight.find_database(database, state_dir)
    try:
        with blocking(place.url, "s2s cli") as txn:
            if is_checked:
                migrations.check(txn)
            yield txn
    finally:
        place.leave()


def show(rows: Sequence[Any], columns: Sequence[str], as_json: bool, nothing: str) -> None:
    """Show dataclass rows: a table of some columns, or JSON of all.

    :param nothing: what to say when there are none.
    """
    found = [asdict(row) for row in rows]
    if as_json:
        click.echo(json.dumps([{name: _plain(value) for name, value in row.items()} for row in found], indent=2))
        return
    if not found:
        click.echo(nothing)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in found:
        # Text, not str: what a peer wrote is no markup.
        table.add_row(*(Text(_shown(row[column])) for column in columns))
    Console().print(table)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    # A terminal obeys control characters, whoever wrote them.
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
