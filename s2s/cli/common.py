"""What the commands share: where the database is, how errors end, how rows are shown and changed."""

from __future__ import annotations

import functools
import getpass
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from s2s.errors import DatabaseError, S2SError
from s2s.roles import preflight
from s2s.roles.options import is_set, variable
from s2s.store import lock_wait, migrations
from s2s.store.cursor import Unreadable
from s2s.store.driver import Cursor, commit
from s2s.store.pool import blocking
from s2s.store.tables import audit

F = TypeVar("F", bound=Callable[..., Any])


def not_empty(context: click.Context, param: click.Parameter, value: Any) -> Any:
    """Refuse an option that is given but empty, and a variable that is set but empty: click takes both for absent."""
    variable = param.envvar if isinstance(param.envvar, str) else ""
    is_default = param.name is None or context.get_parameter_source(param.name) is ParameterSource.DEFAULT
    is_empty = not (os.environ.get(variable, "x") if is_default else str(value)).strip()
    if is_empty:
        source = variable if is_default else param.opts[0]
        raise click.ClickException(f"{source} is empty: give it a value, or leave it out")
    return value


class FilledPath(click.Path):
    """A path, which is not empty: pathlib would read that as the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if not os.fspath(value).strip() and param is not None:
            raise click.ClickException(f"{param.opts[0]} is empty: give it a value, or leave it out")
        return super().convert(value, param, ctx)


state_dir_option = click.option(
    "--state-dir",
    type=FilledPath(file_okay=False, path_type=Path),
    default=preflight.STATE_DIR,
    show_default=True,
    envvar="S2S_STATE_DIR",
    callback=not_empty,
    help="Where the embedded PostgreSQL lives, when no database is named.",
)
world_option = click.option(
    "--no-world",
    is_flag=True,
    help="Leave out the bundled world of sectors, ports and ships; else S2S_NO_WORLD.",
    callback=lambda *given: given[-1] or is_set(variable("no-world")),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most N rows, the newest first."
)
type_option = click.option("--type", "cmd_type", metavar="CMD_TYPE", help="Only these.")
#: Of a list that nobody cuts so many rows are asked for.
ALL: Final = 100_000
#: Of a list so many are shown to people; all are in the JSON.
SHOWN: Final = 10
#: The id of a row.
ROW_ID = click.IntRange(1, 2**53 - 1)


def before_option(member: str) -> Callable[[F], F]:
    """Add the option that goes on where a list was cut.

    :param member: what a row's id is called.
    """
    return click.option(
        "--before", type=ROW_ID, metavar=member, help="Only rows older than this one: the last id of the previous page."
    )


def database_options(function: F) -> F:
    """Add the options that say where the database is."""
    named = click.option(
        "--database",
        metavar="URL",
        callback=not_empty,
        help=f"PostgreSQL URL, or @FILE; else {preflight.DATABASE_VARIABLE}.",
    )
    return named(state_dir_option(function))


def one_line_errors(function: F) -> F:
    """End with one line and exit code 1 where something is wrong that the operator can mend."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except DatabaseError as error:
            raise click.ClickException(preflight.unusable(error)) from None
        except S2SError as error:
            raise click.ClickException(str(error)) from None

    return wrapped  # type: ignore[return-value]


@contextmanager
def transaction(
    database: str | None, state_dir: Path, action: str = "", *, is_checked: bool = True
) -> Iterator[Cursor]:
    """Give one transaction on the database: the one named, the environment's, or the embedded one.

    It is signed for the audit, and so are those that follow where the command commits in between.

    :param action: what all of it is part of, for the audit; without it each change is called by itself.
    :param is_checked: refuse a schema that is not ours.
    """
    place = preflight.find_database(database, state_dir)
    try:
        with (
            blocking(place.url, "s2s cli") as txn,
            lock_wait.late_told(txn.connection, functools.partial(click.echo, err=True)),
        ):
            if is_checked:
                migrations.check(txn)
                audit.sign(txn, actor(), action, for_session=True)
            yield txn
            # Here, where it is told what it waits for.
            commit(txn.connection)
    finally:
        place.leave()


#: The columns of a table that is written to a file or a pipe, so that no value is broken for a terminal that is absent.
_WIDE: Final = 1000


class _Output(Console):
    """The output of tables, which reports a broken pipe as any other output does."""

    def __init__(self) -> None:
        is_wide = "COLUMNS" not in os.environ and not sys.stdout.isatty()
        super().__init__(width=_WIDE if is_wide else None)

    def on_broken_pipe(self) -> None:
        """Leave the error to the program."""
        raise  # noqa: PLE0704 - it is being handled


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
        # Whoever is named first is to be copied from here.
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in found:
        # Text, not str: what a peer wrote is no markup.
        table.add_row(*(Text(_shown(row[column])) for column in columns))
    _Output().print(table)


def show_one(row: Any, as_json: bool) -> None:
    """Show all of one dataclass row: a line for each member, or a JSON object."""
    members = asdict(row)
    if as_json:
        click.echo(json.dumps({name: _plain(value) for name, value in members.items()}, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in members.items():
        table.add_row(name, Text(_shown(value)))
    _Output().print(table)


def actor() -> str:
    """Name whoever types the command, for the audit and the history."""
    try:
        # A name in another encoding than UTF-8.
        return f"cli:{getpass.getuser().encode('utf-8', 'backslashreplace').decode()}"
    except (KeyError, OSError):  # an account without a name
        return f"cli:{os.getuid()}"


def progress_bar() -> Progress:
    """Make a bar of rows, for a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C, for a loop that looks: the exception is lost where it comes up in a destructor or a callback.

    A second Ctrl-C raises KeyboardInterrupt as usual.

    :returns: whether there was one; none is noted where it means something else, or outside the main thread.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        heard.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGINT, before)


def words(value: Any) -> str:
    """Write JSON with few brackets, no quotes and nothing empty: it is for people alone."""
    if isinstance(value, Mapping):
        told = [(name, words(member)) for name, member in value.items()]
        return f"({', '.join(f'{name} {said}' for name, said in told if said)})" if any(s for _, s in told) else ""
    if isinstance(value, list):
        more = f" and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
        return " ".join(map(words, value[:SHOWN])) + more
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Unreadable) else value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    # A terminal obeys control characters, whoever wrote them.
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
