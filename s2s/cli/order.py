"""``s2s order``: giving the engines orders, and following them (docs/protocol.rst, "Orders and their rows")."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import click
from ulid import ULID

from s2s.catalogue import BY_NAME, COMMAND_PUSH, ORDERS
from s2s.catalogue.schema import Schema
from s2s.cli.common import (
    actor,
    database_options,
    json_option,
    limit_option,
    one_line_errors,
    progress_bar,
    read_as,
    show,
    show_one,
    transaction,
    words,
)
from s2s.errors import BadPayload, DatabaseUnavailable, IdemConflict, OperatorError, harmless
from s2s.orders import OrderType, builtin
from s2s.orders.config_set import ConfigSet
from s2s.settings import Value
from s2s.store import audit, config, driver
from s2s.store import orders as table
from s2s.store.driver import Cursor
from s2s.store.orders import OrderRow

#: The exit code where an order is not over, or that is not known.
NOT_OVER: Final = 3
_LOOK_S: Final = 0.05
#: An order's ``idem_key`` is like a command's.
_IDEM_KEY: Final = Schema(BY_NAME[COMMAND_PUSH].request_schema.document["properties"]["idem_key"])


@dataclass(frozen=True)
class _Shown(OrderRow):
    """An order, and in words how far it is."""

    progress: str | None


@click.group()
def order() -> None:
    """Give the engines orders, each run exactly once: over the link, or without one from the table."""


# --- giving ----------------------------------------------------------------------------------------------------------


_KINDS: Final = builtin({}, 0)
#: What the command line calls each order: as its module is called.
_NAMES: Final = {rpc: type(kind).__module__.rpartition(".")[2].replace("_", "-") for rpc, kind in _KINDS.items()}
#: Members that are said by an option.
_OPTIONS: Final = ("reason",)


def _command(kind: OrderType) -> None:
    """Add the command that gives one kind of order: its arguments are the members of the request, in their order.

    The schema of the request judges what is typed, and describes the command.
    """
    rpc, document = kind.rpc, BY_NAME[kind.rpc].request_schema.document
    rules = {member: rule.get("type", "string") for member, rule in document["properties"].items()}
    members = [member for member in rules if member != "order_id"]

    @one_line_errors
    def command(
        idem_key: str | None, wait_s: float, database: str | None, state_dir: Path, as_json: bool, **typed: str
    ) -> None:
        if math.isnan(wait_s):
            raise OperatorError("--wait nan: write a number of seconds")
        wrong = None if idem_key is None else _IDEM_KEY.explain(idem_key, "--idem-key")
        if wrong is not None:
            raise OperatorError(f"{wrong[0]}: {wrong[1]}")
        # What is no text cannot be told to the audit either.
        "".join(typed.values()).encode()
        order_id = None
        try:
            with transaction(database, state_dir) as txn:
                types = {**rules, **_kinds(txn, rpc, typed)}
                params = {member: _read(types[member], text) for member, text in typed.items()}
                order_id = _give(txn, rpc, params, idem_key)
                driver.commit(txn.connection)
                row = _follow(txn, order_id, wait_s)
        except DatabaseUnavailable as error:
            if order_id is None:
                raise
            click.echo(f"the database was lost: {error}: look later with: s2s order show {order_id}", err=True)
            raise SystemExit(NOT_OVER) from None
        _end(row, as_json)

    for member in reversed(members):
        rule = document["properties"][member]
        if member in _OPTIONS:
            command = click.option(f"--{member}", required=True, help=rule["description"])(command)
        else:
            command = click.argument(member, metavar=member.upper())(command)
    for option in (_wait, _idem_key):
        command = option(command)
    order.command(
        name=_NAMES[rpc],
        help=f"{document['description']} ({rpc})\n\n\b\n" + "\n".join(_rule(document, member) for member in members),
        epilog="Exit code 0: it is done; 1: it was refused, or failed; 3: it is not over yet.",
        # A number below zero is no option.
        context_settings={"ignore_unknown_options": True},
    )(database_options(json_option(command)))


def _rule(document: Mapping[str, Any], member: str) -> str:
    """Say what a member of a request may be, out of its schema."""
    rule = document["properties"][member]
    allowed = rule.get("enum") or [f"{rule[bound]}" for bound in ("minimum", "maximum") if bound in rule]
    joined = (" | " if "enum" in rule else " to ").join(allowed)
    return f"{member.upper()}: {rule['description']}{f' {joined}' if allowed else ''}"


def _give(txn: Cursor, rpc: str, params: Mapping[str, Value], idem_key: str | None) -> str:
    """Write an order down, unless its schema refuses it: that goes into the audit, and is committed.

    :returns: its id, or that of the one that was given with this key before.
    """
    order_id = str(ULID())
    try:
        BY_NAME[rpc].request_schema.check({"order_id": order_id, **params}, "")
        return table.give(txn, order_id, rpc, params, actor(), idem_key)[0].order_id
    except BadPayload as error:
        result = {"code": error.code, "message": error.message}
        audit.write(txn, rpc, order_id, params, {"status": "refused", "result": result})
        driver.commit(txn.connection)
        raise OperatorError(f"refused, {error.code}: {error.message}") from None
    except IdemConflict as error:
        first = error.details["order_id"]
        raise OperatorError(f"the --idem-key is that of another order: see it with: s2s order show {first}") from None


def _read(kind: str, text: str) -> Value:
    """Read what was typed as what is wanted; what is nothing of the kind, as what it looks like: others refuse it."""
    read = (read_as(each, text) for each in (kind, "boolean", "integer", "string"))
    return next(value for value in read if value is not None)


def _kinds(txn: Cursor, rpc: str, typed: Mapping[str, str]) -> Mapping[str, str]:
    """Give the types of members of which the schema allows several."""
    if rpc != ConfigSet.rpc:
        return {}
    types = {row.key: row.type for row in config.list_settings(txn)}
    return {"value": types[typed["key"]]} if typed["key"] in types else {}


_idem_key = click.option("--idem-key", metavar="TEXT", help="The same key again is the same order, and shows it.")
_wait = click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    help="Follow it until nothing has moved for so long; 0: give it, and do not wait.",
)
for _kind in _KINDS.values():
    _command(_kind)


# --- following -------------------------------------------------------------------------------------------------------


def _follow(txn: Cursor, order_id: str, wait_s: float) -> OrderRow:
    """Look at an order until it is over, nothing has moved for so long, or Ctrl-C, which leaves it alone."""
    row = _find(txn, order_id)
    with suppress(KeyboardInterrupt), progress_bar() as bar:
        task = bar.add_task(row.rpc, visible=False)
        moved_at = time.monotonic()
        while row.status in table.OPEN and time.monotonic() - moved_at < wait_s:
            time.sleep(_LOOK_S)
            before, row = row, _find(txn, order_id)
            if (row.status, row.state) != (before.status, before.state):
                moved_at = time.monotonic()
            if far := _far(row):
                bar.update(task, completed=far[0], total=far[1], visible=True)
    return row


def _find(txn: Cursor, order_id: str) -> OrderRow:
    """Give an order as it is now, in a transaction of its own."""
    row = table.show(txn, order_id)
    driver.commit(txn.connection)
    if row is None:
        raise OperatorError(f"there is no order {order_id!r}: see s2s order list")
    return row


def _end(row: OrderRow, as_json: bool) -> None:
    """Tell what came of an order, and end with the exit code that says so."""
    shown, result = _shown(row), row.result if isinstance(row.result, dict) else {}
    if as_json:
        show_one(shown, True)
    if row.status in table.OPEN:
        far = shown.progress or ("begun by no engine yet" if row.status == "queued" else "not over")
        click.echo(f"order {row.order_id} is {row.status}, {far}: see s2s order show {row.order_id}", err=True)
        raise SystemExit(NOT_OVER)
    if row.status != "done":
        why = ": ".join(harmless(str(result.get(name, "it is not said why"))) for name in ("code", "message"))
        raise OperatorError(f"order {row.order_id} is {row.status}, {why}")
    if not as_json:
        told = ", ".join(f"{name} {json.dumps(value)}" for name, value in result.items())
        click.echo(f"order {row.order_id} is done: {told or 'there is nothing to tell'}")


def _far(row: OrderRow) -> tuple[int, int] | None:
    """Give how much of an order is done, and of how much; not each says so."""
    state = row.state if isinstance(row.state, dict) else {}
    done, total = state.get("done"), state.get("total")
    return (done, total) if type(done) is int and type(total) is int else None


def _shown(row: OrderRow) -> _Shown:
    far = _far(row)
    return _Shown(**vars(row), progress=f"{far[0]} of {far[1]}" if far else None)


# --- looking ---------------------------------------------------------------------------------------------------------


@order.command(name="show")
@click.argument("order_id", metavar="ID")
@database_options
@json_option
@one_line_errors
def show_(order_id: str, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Show all of one order: how far it is, or what came of it."""
    with transaction(database, state_dir) as txn:
        found = _find(txn, order_id)
    show_one(_shown(found), as_json)


@order.command(name="list")
@click.option("--status", type=click.Choice(("queued", "running", "done", "refused", "failed")), help="Only these.")
@click.option("--rpc", type=click.Choice(ORDERS), help="Only these.")
@limit_option
@database_options
@json_option
@one_line_errors
def list_(
    status: str | None, rpc: str | None, limit: int, database: str | None, state_dir: Path, as_json: bool
) -> None:
    """List orders, the newest first."""
    with transaction(database, state_dir) as txn:
        found = table.list_orders(txn, status=status, rpc=rpc, limit=limit)
    rows = [_shown(row) if as_json else _line(row) for row in found]
    show(rows, ("order_id", "given", "status", "told"), as_json, "there are no orders")


@dataclass(frozen=True)
class _Line:
    """An order as fits a terminal."""

    order_id: str
    given: datetime
    status: str
    told: str


def _line(row: OrderRow) -> _Line:
    result = row.result if isinstance(row.result, dict) else {}
    came = result.get("message") or words(result)[1:-1] or _shown(row).progress
    told = f"{_NAMES.get(row.rpc, row.rpc)} {words(row.params)} by {row.actor}{f' -> {came}' if came else ''}"
    return _Line(row.order_id, row.created_at, row.status, told)
