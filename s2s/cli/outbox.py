"""``s2s outbox``: commands that wait in an engine's outbox for the server."""

from __future__ import annotations

import click

from s2s.admin.operations import outbox
from s2s.cli.actions import add_action
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import ROW_ID, before_option, json_option, limit_option, show, show_one, type_option
from s2s.errors import OperatorError, Refused


@click.group("outbox")
def group() -> None:
    """List, show, retry and cancel the commands of the outbox: those that wait, and those that the server refused."""


@group.command(name="list")
@click.option("--state", type=click.Choice(("waiting", "dead")), help="Show only commands of this state.")
@type_option
@before_option("OUTBOX_ID")
@limit_option
@with_backend
@json_option
def list_(
    backend: Backend, state: str | None, cmd_type: str | None, before: int | None, limit: int, as_json: bool
) -> None:
    """List the commands in the outbox, the newest first."""
    found = rows(backend, outbox.LIST, limit, state=state, cmd_type=cmd_type, before=before)
    columns = ("outbox_id", "cmd_type", "idem_key", "state", "attempts", "send_at", "error_code", "error_message")
    show(found, columns, as_json, "there is nothing in the outbox")


@group.command(name="show")
@click.argument("outbox_id", type=ROW_ID)
@with_backend
@json_option
def show_(backend: Backend, outbox_id: int, as_json: bool) -> None:
    """Show all of one command, with its payload and the reason of its refusal."""
    try:
        found = backend.call(outbox.SHOW, path_params={"outbox_id": outbox_id})
    except Refused as error:
        raise OperatorError(f"{error.message}: see s2s outbox list") from None
    show_one(found, as_json)


add_action(
    group,
    "retry",
    "Send dead rows again, now.",
    outbox.WORDS,
    "outbox_id",
    outbox.RETRY,
    outbox.RETRY_DEAD,
    "retried",
)
add_action(group, "cancel", "Keep rows that wait from being sent.", outbox.WORDS, "outbox_id", outbox.CANCEL)
add_action(
    group,
    "discard",
    "Remove dead rows.",
    outbox.WORDS,
    "outbox_id",
    outbox.DISCARD,
    outbox.DISCARD_DEAD,
    "discarded",
)
