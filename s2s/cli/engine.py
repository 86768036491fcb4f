"""``s2s engine``: steering the engines, by way of the server that has the link (docs/protocol.rst, "Control")."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import click

from s2s.catalogue import BY_NAME, HEALTH_CHECK, PAUSE, RESUME, SHUTDOWN, SWEEP
from s2s.cli.common import actor, database_options, json_option, one_line_errors, show, transaction
from s2s.errors import DatabaseUnavailable, OperatorError, harmless
from s2s.store import driver, engines, notes, steering
from s2s.store.driver import Cursor
from s2s.store.steering import Answer

#: Seconds within which a server must take a request, and then has for the engine's answer.
TAKE_S: Final = 3.0
ANSWER_S: Final = 35.0
#: After so many seconds a server that took it and is gone is not waited for.
GONE_S: Final = 6.0
_LOOK_S: Final = 0.05


@dataclass(frozen=True)
class _EngineRow:
    """An engine and what it says of itself; without a link most is unknown."""

    name: str
    state: str
    wanted: str
    degraded: bool | None
    config_version: int | None
    outbox_depth: int | None
    uptime_s: int | None
    version: str | None
    key_id: str | None
    address: str | None
    linked_at: datetime | None
    reason: str


@click.group()
def engine() -> None:
    """Steer the engines: the server that has the link sends the request, and the engine's answer is shown."""


@engine.command(name="list")
@database_options
@json_option
@one_line_errors
def list_(database: str | None, state_dir: Path, as_json: bool) -> None:
    """List the engines, each with what it says now."""
    with transaction(database, state_dir) as txn:
        found = engines.list_engines(txn)
        asked = {
            row.name: steering.ask(txn, row.name, HEALTH_CHECK, {}, actor(), TAKE_S) for row in found if row.key_id
        }
        answers = _wait(txn, list(asked.values()))
    rows = []
    for row in found:
        answer = answers.get(asked.get(row.name, 0))
        said = (answer.answer if answer and answer.is_ok else None) or {}
        rows.append(
            _EngineRow(
                name=row.name,
                state=said.get("state", "no link" if row.key_id is None else "no answer"),
                wanted=row.wanted,
                degraded=said.get("degraded"),
                config_version=said.get("config_version"),
                outbox_depth=said.get("outbox_depth"),
                uptime_s=said.get("uptime_s"),
                version=said.get("version"),
                key_id=row.key_id,
                address=row.address,
                linked_at=row.linked_at,
                reason=row.reason,
            )
        )
    columns = (
        "name",
        "state",
        "wanted",
        "degraded",
        "config_version",
        "outbox_depth",
        "uptime_s",
        "version",
        "address",
    )
    show(rows, columns, as_json, "no engine is linked, and of none is anything wanted")


def _command(name: str, type: str, help_text: str, *options: Any) -> None:
    """Add a command that sends one request and shows its answer."""

    @one_line_errors
    def command(engine_name: str | None, database: str | None, state_dir: Path, as_json: bool, **payload: Any) -> None:
        said = {member: value for member, value in payload.items() if value is not None}
        wrong = BY_NAME[type].request_schema.explain(said, "")
        if wrong is not None:
            raise OperatorError(f"{wrong[0].lstrip('/')}: {wrong[1]}")
        is_asked = False
        try:
            with transaction(database, state_dir) as txn:
                target = engine_name or _only(txn)
                request_id = steering.ask(txn, target, type, said, actor(), TAKE_S)
                is_asked = True
                ack = _ack(target, _wait(txn, [request_id])[request_id])
        except DatabaseUnavailable as error:
            if is_asked:
                raise OperatorError(f"the database was lost, and the outcome is unknown: {error}") from None
            raise
        click.echo(json.dumps({"engine": target, **ack}, indent=2) if as_json else f"{target}: {_told(ack)}")

    for option in (*options, click.argument("engine_name", metavar="[NAME]", required=False)):
        command = option(command)
    engine.command(name=name, help=help_text)(database_options(json_option(command)))


_reason = click.option("--reason", default="asked for at a command line", show_default=True, help="For the log.")
_command(
    "pause",
    PAUSE,
    "Let an engine begin no job until it is resumed, a restart included. Its outbox still goes out.",
    _reason,
)
_command("resume", RESUME, "Let a paused engine go on.", _reason)
_command(
    "shutdown",
    SHUTDOWN,
    "Let an engine finish what it has in hand, and end for good, with exit code 0.",
    _reason,
    click.option(
        "--grace-ms", type=click.IntRange(0, 600_000), default=5000, show_default=True, help="For what it has in hand."
    ),
)
_command(
    "sweep",
    SWEEP,
    "Let an engine put the pending broadcasts into its outbox.",
    click.option(
        "--since", "since_ts", type=click.IntRange(0), default=0, show_default=True, help="Created since, Unix seconds."
    ),
)


def _only(txn: Cursor) -> str:
    """Give the name of the only engine that is linked."""
    linked = sorted({row.name for row in engines.list_engines(txn) if row.key_id})
    if len(linked) == 1:
        return linked[0]
    if not linked:
        raise OperatorError("no engine is linked to any server: see s2s engine list")
    raise OperatorError(f"name one of the engines: {', '.join(map(harmless, linked))}")


def _wait(txn: Cursor, request_ids: list[int]) -> dict[int, Answer]:
    """Wait for the answers; what no server takes in time is withdrawn, so that it never happens."""
    driver.commit(txn.connection)
    started = time.monotonic()
    withdrawn: set[int] = set()
    while True:
        found = steering.look(txn, request_ids)
        waited_s = time.monotonic() - started
        if waited_s > TAKE_S:
            untaken = [request_id for request_id, answer in found.items() if not answer.is_taken]
            withdrawn.update(request_id for request_id in untaken if steering.withdraw(txn, request_id))
        waiting = [request_id for request_id, answer in found.items() if not answer.is_over]
        if waited_s > GONE_S:
            waiting = [request_id for request_id in waiting if notes.is_present(txn, found[request_id].taken_by or "")]
        driver.commit(txn.connection)
        if withdrawn.issuperset(waiting) or waited_s > TAKE_S + ANSWER_S:
            return found
        time.sleep(_LOOK_S)


def _ack(target: str, answer: Answer) -> dict[str, Any]:
    said = answer.answer or {}
    if answer.is_ok:
        return said
    if not answer.is_taken:
        raise OperatorError(f"no server has a link to an engine {target!r}: see s2s engine list")
    if answer.is_ok is False:
        raise OperatorError(f"{harmless(target)} refused, {harmless(said['code'])}: {harmless(said['message'])}")
    why = harmless(str(said.get("message", "the server that took the request did not report")))
    raise OperatorError(f"{harmless(target)} did not answer, the outcome is unknown: {why}")


def _told(ack: Mapping[str, Any]) -> str:
    if "queued" in ack:
        return f"{ack['queued']} broadcasts queued"
    if "deadline_ms" in ack:
        deadline = datetime.fromtimestamp(ack["deadline_ms"] / 1000, timezone.utc)
        return f"{ack['state']}, its grace ends at {deadline:%H:%M:%S} UTC"
    return str(ack.get("state", "done"))
