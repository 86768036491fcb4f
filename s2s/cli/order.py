"""``s2s order``: give orders to the engines, and follow them (docs/protocol.rst, "Orders and their rows")."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn

import click

from s2s.admin.operations import config, orders
from s2s.admin.operations.operation import IDEM_KEY
from s2s.admin.operations.orders import OrderView
from s2s.cli.backend import Backend, HttpBackend, rows, with_backend
from s2s.cli.common import ALL, interrupt_noted, json_option, limit_option, progress_bar, show, show_one, words
from s2s.errors import (
    CallError,
    DatabaseUnavailable,
    DeadlineExceeded,
    IdemConflict,
    NotFound,
    OperatorError,
    Refused,
    UnknownOutcome,
    harmless,
)
from s2s.handlers.discovery import installed
from s2s.handlers.orders import OrderHandler, command_name
from s2s.handlers.orders.config_set import ConfigSet
from s2s.protocol.settings import Value, read_as
from s2s.roles.options import is_set, variable
from s2s.store.tables.orders import OPEN

#: The exit code if an order is not over, or if that is unknown.
NOT_OVER: Final = 3
#: Seconds between two reads of an order that is not over.
_LOOK_S: Final = 0.25


class _Orders(click.Group):
    """The commands of this module, and one for each installed order handler; these load the plug-ins."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(context), *_names()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command by its name."""
        handler = None if name in self.commands else _names().get(name)
        return super().get_command(context, name) if handler is None else _command(handler)


def _names() -> dict[str, OrderHandler]:
    """Return the installed order handlers by their names on the command line."""
    found = installed(not is_set(variable("no-world")))
    return {command_name(handler): handler for handler in found.orders.values()}


@click.group(cls=_Orders)
def order() -> None:
    """Give engines orders, each run exactly once: over the link or, without one, from the table."""


# --- giving ----------------------------------------------------------------------------------------------------------


#: Stands before the name of each param of an order, whose name may be that of another option of the command.
_PARAM: Final = "param_"
#: Params of orders that are options on the command line.
_OPTIONS: Final = ("reason",)


def _command(handler: OrderHandler) -> click.Command:
    """Return the command that gives one kind of order: its arguments are the required params, in their order.

    The schema of the params validates the arguments and describes the command.
    """
    rpc, document = handler.rpc, handler.schema
    rules = {member: rule.get("type", "string") for member, rule in document.get("properties", {}).items()}

    def command(backend: Backend, idem_key: str | None, wait_s: float, as_json: bool, **options: str) -> None:
        if math.isnan(wait_s):
            raise OperatorError("--wait nan: write a number of seconds")
        wrong = None if idem_key is None else IDEM_KEY.explain(idem_key, "--idem-key")
        if wrong is not None:
            raise OperatorError(f"{wrong[0]}: {wrong[1]}")
        typed = {name.removeprefix(_PARAM): text for name, text in options.items() if text is not None}
        # Raise on text that is not valid Unicode: the audit could not record it either.
        "".join(typed.values()).encode()
        types = {**rules, **_kinds(backend, rpc, typed)}
        params = {member: _read(types[member], text) for member, text in typed.items()}
        row = _give(backend, handler, params, idem_key)
        _end(_follow(backend, row, wait_s), as_json)

    opened = with_backend(command)
    required = document.get("required", ())
    for member in reversed(rules):
        if member in _OPTIONS or member not in required:
            said = document["properties"][member].get("description", "")
            name = f"--{member.replace('_', '-')}"
            opened = click.option(name, _PARAM + member, required=member in required, help=said)(opened)
        else:
            opened = click.argument(_PARAM + member, metavar=member.upper())(opened)
    for option in (_wait, _idem_key):
        opened = option(opened)
    made: click.Command = click.command(
        name=command_name(handler),
        help=f"{document['description']} ({rpc})\n\n\b\n" + "\n".join(_rule(document, member) for member in rules),
        epilog="Exit code 0: it is done; 1: it was refused, or failed; 3: it is not over yet.",
        # A negative number is not an option.
        context_settings={"ignore_unknown_options": True},
    )(json_option(opened))
    return made


def _rule(document: Mapping[str, Any], member: str) -> str:
    """Describe the allowed values of a request member, from its schema."""
    rule = document["properties"][member]
    choices = rule.get("enum") or (["true", "false"] if rule.get("type") == "boolean" else [])
    bounds = [f"{rule[bound]}" for bound in ("minimum", "maximum") if bound in rule]
    allowed = " | ".join(choices) or " to ".join(bounds)
    return f"{member.upper()}: {rule.get('description', '')}{f' {allowed}' if allowed else ''}"


def _give(backend: Backend, handler: OrderHandler, params: Mapping[str, Value], idem_key: str | None) -> OrderView:
    """Give an order, or return the order that was given with this key before."""
    try:
        return backend.call(orders.operation(handler), body=params, idem_key=idem_key)
    except Refused as error:
        order_id = error.details.get("order_id")
        if error.code == IdemConflict.code:
            raise OperatorError(
                f"the --idem-key is that of another order: see it with: s2s order show {order_id}"
            ) from None
        if order_id is not None:
            _leave(f"{error.message}: s2s order show {order_id}")
        if error.code == DeadlineExceeded.code and idem_key is not None:
            _leave(f"{error.message}: the same --idem-key again is the same order")
        raise OperatorError(f"refused, {error.code}: {error.message.replace('at /body/', 'at /', 1)}") from None
    except UnknownOutcome as error:
        _leave(f"{error}: s2s order list")


def _leave(why: str) -> NoReturn:
    """Exit with :data:`NOT_OVER`, because the outcome of an order is unknown."""
    click.echo(why, err=True)
    raise SystemExit(NOT_OVER)


def _read(kind: str, text: str) -> Value:
    """Convert an argument to its type; if it does not fit, to the type that it looks like, which the schema rejects."""
    read = (read_as(each, text) for each in (kind, "boolean", "integer", "string"))
    return next(value for value in read if value is not None)


def _kinds(backend: Backend, rpc: str, typed: Mapping[str, str]) -> Mapping[str, str]:
    """Return the types of the members for which the schema allows several."""
    if rpc != ConfigSet.rpc:
        return {}
    types = {row.key: row.type for row in rows(backend, config.LIST, ALL)}
    return {"value": types[typed["key"]]} if typed["key"] in types else {}


_idem_key = click.option(
    "--idem-key", metavar="TEXT", help="A key of the order. An order with the same key is made only once."
)
_wait = click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    help="Wait until the order is over, or makes no progress for SECONDS. 0: do not wait.",
)


# --- following -------------------------------------------------------------------------------------------------------


def _follow(backend: Backend, row: OrderView, wait_s: float) -> OrderView:
    """Read an order until it is over, for ``wait_s`` seconds without progress, or until Ctrl-C, which ends the wait."""
    # A call over HTTP loses no exception, and may wait long for a server that does not respond.
    noted: AbstractContextManager[Callable[[], bool]] = interrupt_noted()
    if isinstance(backend, HttpBackend):
        noted = nullcontext(lambda: False)
    with suppress(KeyboardInterrupt), noted as is_interrupted, progress_bar() as bar:
        task = bar.add_task(row.rpc, visible=False)
        moved_at = time.monotonic()
        while row.status in OPEN and time.monotonic() - moved_at < wait_s and not is_interrupted():
            try:
                before, row = (
                    row,
                    backend.call(orders.SHOW, path_params={"order_id": row.order_id}, query={"wait": _LOOK_S}),
                )
            except (DatabaseUnavailable, CallError, OperatorError) as error:
                lost = "database" if isinstance(error, DatabaseUnavailable) else "server"
                _leave(f"the {lost} was lost: {error}: look later with: s2s order show {row.order_id}")
            if (row.status, row.state) != (before.status, before.state):
                moved_at = time.monotonic()
            if progress := orders.far(row):
                bar.update(task, completed=progress[0], total=progress[1], visible=True)
    return row


def _end(row: OrderView, as_json: bool) -> None:
    """Print the outcome of an order, and exit with the matching exit code."""
    result = row.result if isinstance(row.result, dict) else {}
    if as_json:
        show_one(row, True)
    if row.status in OPEN:
        far = row.progress or ("begun by no engine yet" if row.status == "queued" else "not over")
        click.echo(f"order {row.order_id} is {row.status}, {far}: see s2s order show {row.order_id}", err=True)
        raise SystemExit(NOT_OVER)
    if row.status != "done":
        why = ": ".join(harmless(str(result.get(name, "it is not said why"))) for name in ("code", "message"))
        raise OperatorError(f"order {row.order_id} is {row.status}, {why}")
    if not as_json:
        told = ", ".join(f"{name} {json.dumps(value)}" for name, value in result.items())
        click.echo(f"order {row.order_id} is done: {told or 'there is nothing to tell'}")


# --- looking ---------------------------------------------------------------------------------------------------------


@order.command(name="show")
@click.argument("order_id", metavar="ID")
@with_backend
@json_option
def show_(backend: Backend, order_id: str, as_json: bool) -> None:
    """Show all of one order, with its progress or its result."""
    try:
        found = backend.call(orders.SHOW, path_params={"order_id": order_id})
    except Refused as error:
        if error.code != NotFound.code:
            raise
        raise OperatorError(f"there is no order {order_id!r}: see s2s order list") from None
    show_one(found, as_json)


@order.command(name="list")
@click.option(
    "--status",
    type=click.Choice(("queued", "running", "done", "refused", "failed")),
    help="Show only orders of this status.",
)
@click.option("--rpc", metavar="RPC", help="Show only orders of this RPC.")
@click.option("--before", metavar="ORDER_ID", help="Only rows older than this one: the last id of the previous page.")
@limit_option
@with_backend
@json_option
def list_(backend: Backend, status: str | None, rpc: str | None, before: str | None, limit: int, as_json: bool) -> None:
    """List orders, the newest first."""
    found = rows(backend, orders.LIST, limit, status=status, rpc=rpc, before=before)
    lines = found if as_json else [_line(row) for row in found]
    show(lines, ("order_id", "given", "status", "told"), as_json, "there are no orders")


@dataclass(frozen=True)
class _Line:
    """An order as a terminal line."""

    order_id: str
    given: datetime
    status: str
    told: str


def _line(row: OrderView) -> _Line:
    result = row.result if isinstance(row.result, dict) else {}
    came = result.get("message") or words(result)[1:-1] or row.progress
    told = f"{row.rpc} {words(row.params)} by {row.actor}{f' -> {came}' if came else ''}"
    return _Line(row.order_id, row.created_at, row.status, told)
