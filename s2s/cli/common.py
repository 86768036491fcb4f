"""What the commands share: where the database is, how errors end, how rows are shown and changed."""

from __future__ import annotations

import functools
import getpass
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from s2s import preflight
from s2s.errors import DatabaseError, OperatorError, S2SError
from s2s.settings import Value
from s2s.store import actions, audit, driver, migrations
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
type_option = click.option("--type", "cmd_type", metavar="CMD_TYPE", help="Only these.")
#: Of a list so many are shown to people; all are in the JSON.
SHOWN: Final = 10
#: The id of a row, as far as a bigint goes.
ROW_ID = click.IntRange(1, 2**63 - 1)


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
        except DatabaseError as error:
            cure = f"see --database and {preflight.DATABASE_VARIABLE}"
            raise click.ClickException(f"the database cannot be used: {error}: {cure}") from None
        except S2SError as error:
            raise click.ClickException(str(error)) from None
        except UnicodeEncodeError:
            raise click.ClickException("an argument is not UTF-8: type it in a UTF-8 terminal") from None

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
        with blocking(place.url, "s2s cli") as txn:
            if is_checked:
                migrations.check(txn)
                audit.sign(txn, actor(), action, for_session=True)
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
        # Whoever is named first is to be copied from here.
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in found:
        # Text, not str: what a peer wrote is no markup.
        table.add_row(*(Text(_shown(row[column])) for column in columns))
    Console().print(table)


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
    Console().print(table)


@dataclass(frozen=True)
class Words:
    """How the rows of a table are spoken of.

    :param noun: what one is called.
    :param done: by the word of a :class:`s2s.store.actions.Fate` that is done, what became of the row.
    :param obstacles: by the word of one that is not, what is in the way and what can be done, with ``{id}`` in it.
    """

    noun: str
    done: Mapping[str, str]
    obstacles: Mapping[str, str]

    def tell(self, fate: actions.Fate) -> str:
        """Say in one line what became of a row."""
        said = (self.done if fate.is_done else self.obstacles)[fate.word]
        return f"{self.noun} {fate.row_id}: {said.format(id=fate.row_id)}"


def add_action(
    group: click.Group,
    help_text: str,
    action: actions.Action,
    words: Words,
    *,
    dead: str | None = None,
    params: Callable[[Cursor], dict[str, Any]] = lambda _: {},
) -> None:
    """Add a command that does something to rows: to those whose ids are named, or to all dead ones.

    :param dead: the past participle of what ``--all-dead`` does; without it there is no such option.
    :param params: reads the further parameters of the action's statement.
    """

    @one_line_errors
    def command(
        ids: tuple[int, ...],
        database: str | None,
        state_dir: Path,
        as_json: bool,
        all_dead: bool = False,
        cmd_type: str | None = None,
    ) -> None:
        if bool(ids) == all_dead:
            raise OperatorError(f"name the ids of {words.noun}s" + (", or else --all-dead" if dead else ""))
        if cmd_type is not None and not all_dead:
            raise OperatorError("--type chooses among all: it goes with --all-dead")
        with transaction(database, state_dir) as txn:
            more = params(txn)
            if all_dead:
                count = _act_on_dead(txn, action, cmd_type, more)
                click.echo(json.dumps({dead: count}) if as_json else f"dead {words.noun}s {dead}: {count}")
                return
            fates = []
            for fate in _act(txn, action, list(dict.fromkeys(ids)), more):
                fates.append(fate)
                if not as_json:
                    click.echo(words.tell(fate), err=not fate.is_done)
        if as_json:
            told = [{action.id: fate.row_id, "is_done": fate.is_done, "outcome": fate.word} for fate in fates]
            click.echo(json.dumps(told, indent=2))
        if not all(fate.is_done for fate in fates):
            raise SystemExit(1)

    if dead:
        command = type_option(click.option("--all-dead", is_flag=True, help="All that are dead.")(command))
    argument = click.argument("ids", metavar=f"{action.id.upper()}...", nargs=-1, type=ROW_ID)
    group.command(name=action.verb, help=help_text)(argument(database_options(json_option(command))))


def _act(txn: Cursor, action: actions.Action, ids: list[int], params: dict[str, Any]) -> Iterator[actions.Fate]:
    """Do an action to rows, so many in a transaction, and give the fate of each after its COMMIT."""
    for at in range(0, len(ids), actions.STEP_ROWS):
        fates = actions.act(txn, action, ids[at : at + actions.STEP_ROWS], **params)
        driver.commit(txn.connection)
        yield from fates


def _act_on_dead(txn: Cursor, action: actions.Action, cmd_type: str | None, params: dict[str, Any]) -> int:
    """Do an action to all dead rows, so many in a transaction, and count them."""
    count = after = 0
    while step := actions.act_on_dead(txn, action, after, cmd_type, **params):
        driver.commit(txn.connection)
        count += len(step)
        after = step[-1]
    return count


def actor() -> str:
    """Name whoever types the command, for the audit and the history."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # an account without a name
        return f"cli:{os.getuid()}"


def read_as(kind: str, text: str) -> Value | None:
    """Read a value that was typed.

    :param kind: ``string``, ``integer`` or ``boolean``.
    :returns: ``None``: it is nothing of the kind.
    """
    if kind == "string":
        return text
    if kind == "boolean" and text in ("true", "false"):
        return text == "true"
    if kind == "integer" and text.removeprefix("-").isdecimal() and text.isascii() and len(text) <= 17:
        return int(text)
    return None


def progress_bar() -> Progress:
    """Make a bar of rows, for a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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
    return str(value) if isinstance(value, driver.Unreadable) else value


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
