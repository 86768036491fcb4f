"""``s2s engine``: control of engines (docs/protocol.rst, "Proof and control requests")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import click

from s2s.admin.operations import engines
from s2s.admin.operations.operation import Operation
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import ALL, json_option, show
from s2s.errors import BadPayload, OperatorError, Refused, harmless


@click.group()
def engine() -> None:
    """Control the engines: the server with the link sends the request, and the reply of the engine is shown."""


@engine.command(name="list")
@with_backend
@json_option
def list_(backend: Backend, as_json: bool) -> None:
    """List the engines, each with its current state."""
    columns = (
        "name",
        "state",
        "wanted",
        "degraded",
        "config_version",
        "outbox_depth",
        "stuck",
        "uptime_s",
        "version",
        "key_id",
        "address",
    )
    found = rows(backend, engines.LIST, ALL)
    show(found, columns, as_json, "no engine is linked, and none has a desired state")


def _command(name: str, operation: Operation[dict[str, Any]], help_text: str, *options: Any) -> None:
    """Add a command that sends one request and shows the reply."""

    def command(backend: Backend, engine_name: str | None, as_json: bool, **payload: Any) -> None:
        target = engine_name or _only(backend)
        try:
            ack = backend.call(operation, path_params={"name": target}, body=payload)
        except Refused as error:
            raise OperatorError(_refusal(error)) from None
        click.echo(json.dumps(ack, indent=2) if as_json else f"{target}: {_told(ack)}{_of_several(ack)}")

    opened = with_backend(command)
    for option in (*options, click.argument("engine_name", metavar="[NAME]", required=False)):
        opened = option(opened)
    engine.command(name=name, help=help_text)(json_option(opened))


_reason = click.option(
    "--reason", default="requested at a command line", show_default=True, help="The reason, for the log."
)
_command("health", engines.HEALTH, "Ask an engine how it is.")
_command(
    "pause",
    engines.PAUSE_ENGINE,
    "Start no jobs until the engine is resumed, even after a restart. Its outbox is still sent.",
    _reason,
)
_command("resume", engines.RESUME_ENGINE, "Let a paused engine go on.", _reason)
_command(
    "shutdown",
    engines.SHUT_DOWN_ENGINE,
    "Let an engine finish the work in progress, and exit with code 0.",
    _reason,
    click.option(
        "--grace-ms",
        type=click.IntRange(0, 600_000),
        default=5000,
        show_default=True,
        help="Milliseconds that work in progress may take.",
    ),
)
_command(
    "sweep",
    engines.SWEEP_ENGINE,
    "Let an engine put the pending broadcasts into its outbox.",
    click.option(
        "--since",
        "since_ts",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Sweep only broadcasts created since this time, in Unix seconds.",
    ),
)


def _only(backend: Backend) -> str:
    """Return the name of the only engine that is linked."""
    linked = sorted({row.name for row in rows(backend, engines.LIST, ALL) if row.key_id})
    if len(linked) == 1:
        return linked[0]
    if not linked:
        raise OperatorError("no engine is linked to any server: see s2s engine list")
    raise OperatorError(f"name one of the engines: {', '.join(map(harmless, linked))}")


def _refusal(error: Refused) -> str:
    said = harmless(error.message)
    if "engine" in error.details:
        return f"{harmless(str(error.details['engine']))} refused, {harmless(error.code)}: {said}"
    if error.code == BadPayload.code:
        return said.removeprefix("at /body/")
    return f"{said}: see s2s engine list"


def _of_several(ack: Mapping[str, Any]) -> str:
    keys = ack.get("keys")
    if not keys:
        return ""
    return f" ({len(keys)} engines have this name, under the keys {', '.join(map(harmless, keys))})"


def _told(ack: Mapping[str, Any]) -> str:
    if "queued" in ack:
        return f"{ack['queued']} broadcasts queued"
    if "deadline_ms" in ack:
        deadline_ms = ack["deadline_ms"]
        try:
            deadline = f"{datetime.fromtimestamp(deadline_ms / 1000, timezone.utc):%H:%M:%S} UTC"
        except (ValueError, OverflowError, OSError):  # from a peer in another language
            deadline = f"{deadline_ms} ms of Unix time"
        return f"{ack['state']}, its grace ends at {deadline}"
    return str(ack.get("state", "done"))
