"""Options, transactions, error reports and tables of rows that the commands share."""

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
    """Refuse an option with an empty value, and a variable that is set but empty: click takes both for absent."""
    variable = param.envvar if isinstance(param.envvar, str) else ""
    is_default = param.name is None or context.get_parameter_source(param.name) is ParameterSource.DEFAULT
    is_empty = not (os.environ.get(variable, "x") if is_default else str(value)).strip()
    if is_empty:
        source = variable if is_default else param.opts[0]
        raise click.ClickException(f"{source} is empty: give it a value, or leave it out")
    return value


class FilledPath(click.Path):
    """The type of a path that is not empty: pathlib reads an empty path as the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the text of an option to a path.

        :raises click.ClickException: the text is empty.
        """
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
    help="The directory of the embedded PostgreSQL, which runs if no database is named.",
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
type_option = click.option("--type", "cmd_type", metavar="CMD_TYPE", help="Show only commands of this type.")
#: The maximum number of rows of a list without a --limit.
ALL: Final = 100_000
#: The number of members of a JSON list that a table shows; the JSON output has all of them.
SHOWN: Final = 10
#: The type of a row id: the integers that JSON numbers hold exactly.
ROW_ID = click.IntRange(1, 2**53 - 1)


def before_option(member: str) -> Callable[[F], F]:
    """Add the option ``--before``, which requests the next page of a list.

    :param member: the name of the column that holds the id of a row.
    """
    return click.option(
        "--before", type=ROW_ID, metavar=member, help="Only rows older than this one: the last id of the previous page."
    )


def database_options(function: F) -> F:
    """Add the options ``--database`` and ``--state-dir``."""
    named = click.option(
        "--database",
        metavar="URL",
        callback=not_empty,
        help=f"PostgreSQL URL, or @FILE; else {preflight.DATABASE_VARIABLE}.",
    )
    return named(state_dir_option(function))


def one_line_errors(function: F) -> F:
    """Make a command report an :class:`S2SError` in one line, and exit with code 1."""

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
    """Open one transaction on the database: the one of the option, of the environment, or the embedded one.

    The audit log names the user of this transaction, and of those that follow if the command commits in between.

    :param action: the action that the audit log names for all changes; without it each change is its own action.
    :param is_checked: whether a database without the current schema is refused.
    :raises S2SError: the database cannot be used.
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
            # The commit is inside the block, so that a long wait of it is reported.
            commit(txn.connection)
    finally:
        place.leave()


#: The width, in columns, of a table that is written to a file or a pipe: no value needs a second line.
_WIDE: Final = 1000


class _Output(Console):
    """A console that raises the error of a broken pipe; Rich ends the process instead."""

    def __init__(self) -> None:
        is_wide = "COLUMNS" not in os.environ and not sys.stdout.isatty()
        super().__init__(width=_WIDE if is_wide else None)

    def on_broken_pipe(self) -> None:
        """Raise the error, for the handler of the program."""
        raise  # noqa: PLE0704 - it is being handled


def show(rows: Sequence[Any], columns: Sequence[str], as_json: bool, nothing: str) -> None:
    """Show dataclass rows: a table of the given columns, or JSON of all members.

    :param nothing: the line that stands for an empty list.
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
        # The first column holds the id, which people copy: it stays on one line.
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in found:
        # Text, not str: Rich would interpret markup in the text of a peer.
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
    """Return the name of the operating system user, for the audit log and the history."""
    try:
        # The encoding of the name can be another than UTF-8.
        return f"cli:{getpass.getuser().encode('utf-8', 'backslashreplace').decode()}"
    except (KeyError, OSError):  # an account without a name
        return f"cli:{os.getuid()}"


def progress_bar() -> Progress:
    """Make a progress bar that counts rows. It is shown on a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C, for a loop that polls: a KeyboardInterrupt in a destructor or a callback would be lost.

    A second Ctrl-C raises KeyboardInterrupt.

    :returns: a function that returns whether Ctrl-C was pressed. It is always false if SIGINT has another handler, and
        outside the main thread.
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
    """Write JSON for people: with few brackets, without quotes, and without empty members."""
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
    # A control character in the text of a peer would be obeyed by the terminal.
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
