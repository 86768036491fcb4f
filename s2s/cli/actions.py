"""Commands that apply an action to rows, such as a retry, for each group of commands that lists rows."""

from __future__ import annotations

import json
from typing import Any

import click

from s2s.admin.operations.operation import Operation
from s2s.admin.operations.rows import BulkOutcome, RowOperations, RowOutcomes, Wording
from s2s.cli.backend import Backend, with_backend
from s2s.cli.common import ROW_ID, json_option, type_option
from s2s.errors import OperatorError
from s2s.store.tables import actions


def add_action(
    group: click.Group,
    verb: str,
    help_text: str,
    words: Wording,
    member: str,
    operations: RowOperations,
    dead: Operation[BulkOutcome] | None = None,
    done: str = "",
) -> None:
    """Add a command that applies an action to the rows with the given ids, or to all dead rows.

    :param member: the name of the id of a row.
    :param dead: the operation of ``--all-dead``; ``None``: the command has no such option.
    :param done: the verb's past participle.
    """
    cure = f"s2s {group.name} {{verb}} {{id}}"

    def command(
        backend: Backend, ids: tuple[int, ...], as_json: bool, all_dead: bool = False, cmd_type: str | None = None
    ) -> None:
        if bool(ids) == all_dead:
            raise OperatorError(f"name the ids of {words.noun}s" + (", or else --all-dead" if dead else ""))
        if cmd_type is not None and not all_dead:
            raise OperatorError("--type chooses among all: it goes with --all-dead")
        if all_dead and dead is not None:
            count = _all_dead(backend, dead, cmd_type)
            click.echo(json.dumps({done: count}) if as_json else f"dead {words.noun}s {done}: {count}")
            return
        told: list[dict[str, Any]] = []
        is_all_done = True
        named = list(dict.fromkeys(ids))
        for at in range(0, len(named), actions.STEP_ROWS):
            found: RowOutcomes = backend.call(operations.some, body={"ids": named[at : at + actions.STEP_ROWS]})
            for fate in found.items:
                is_all_done = is_all_done and fate.is_done
                told.append({member: fate.id, "is_done": fate.is_done, "outcome": fate.outcome})
                if not as_json:
                    more = f": see s2s {group.name} list" if fate.outcome == actions.MISSING else ""
                    click.echo(words.tell(fate, cure) + more, err=not fate.is_done)
        if as_json:
            click.echo(json.dumps(told, indent=2))
        if not is_all_done:
            raise SystemExit(1)

    opened = with_backend(command)
    if dead is not None:
        opened = type_option(click.option("--all-dead", is_flag=True, help="Select all dead commands.")(opened))
    argument = click.argument("ids", metavar=f"{member.upper()}...", nargs=-1, type=ROW_ID)
    group.command(name=verb, help=help_text)(argument(json_option(opened)))


def _all_dead(backend: Backend, operation: Operation[BulkOutcome], cmd_type: str | None) -> int:
    count = 0
    while True:
        swept = backend.call(operation, body={"cmd_type": cmd_type})
        count += swept.count
        if swept.is_all:
            return count
