"""Control of the engines, through the server that has the link (docs/protocol.rst, "Proof and control requests")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from s2s.admin.operations.operation import Left, Operation, OperationRequest, Part, Reply, Rule, Steps, WaitFor
from s2s.admin.operations.pages import KEY, Page, after_key, listing, page
from s2s.errors import (
    BadReply,
    DbUnavailable,
    DeadlineExceeded,
    InternalError,
    NotFound,
    NotReady,
    Overloaded,
    Paused,
    Refused,
    S2SError,
    ShuttingDown,
    UnknownOutcome,
    harmless,
)
from s2s.protocol.catalogue import BY_NAME, HEALTH_CHECK, PAUSE, RESUME, SHUTDOWN, SWEEP
from s2s.store.access import Access
from s2s.store.driver import Cursor
from s2s.store.tables import control_requests, engines
from s2s.store.tables.control_requests import Answer
from s2s.store.tables.engines import EngineRow

NAME: Final[Rule] = {"type": "string", "minLength": 1, "maxLength": 200, "description": "The name of the engine."}

#: Seconds within which a server writes the row of a new link.
SHOWN_S: Final = 0.3


@dataclass(frozen=True)
class Engine:
    """An engine and its health as it reports it; without a link most members are unknown.

    :param state: the state that the engine reports, or ``no link``, ``no answer`` or ``invalid answer``.
    :param wanted: the desired state, ``running`` or ``paused``; ``reason`` is its reason. ``None``: the engine does not
        share this database, and its desired state is in its own.
    :param stuck: the jobs and orders whose thread does not return.
    """

    name: str
    state: str
    wanted: str | None
    degraded: bool | None
    config_version: int | None
    outbox_depth: int | None
    stuck: list[str] | None
    uptime_s: int | None
    version: str | None
    key_id: str | None
    address: str | None
    linked_at: datetime | None
    reason: str


def _list(ask: OperationRequest) -> Steps[Page[Engine]]:
    """Ask each engine of the page for its health."""
    rows: Page[EngineRow] = yield partial(_page, ask.query["limit"], ask.query.get("cursor"))
    engines_now = yield from _with_health(ask, rows.items)
    return Reply(Page(engines_now, rows.next_cursor))


def _page(limit: int, cursor: str | None, txn: Cursor) -> Page[EngineRow]:
    found = engines.list_engines(txn)
    return page(lambda limit, before: after_key(found, _key, limit, before), _key, limit, cursor)


def _key(row: EngineRow) -> str:
    return f"{row.name}\n{row.key_id or ''}"


def _show(ask: OperationRequest) -> Steps[Engine]:
    row = yield lambda txn: _find(txn, ask.path_params["name"])
    [found] = yield from _with_health(ask, [row])
    return Reply(found)


def _find(txn: Cursor, name: str) -> EngineRow:
    """Return the engine of this name; of several, the one to which a request would be sent."""
    found = [row for row in engines.list_engines(txn) if row.name == name]
    if not found:
        raise NotFound(_UNLINKED.format(name=harmless(name)))
    return max(found, key=lambda row: row.linked_at.timestamp() if row.linked_at else 0.0)


def _with_health(ask: OperationRequest, rows: Sequence[EngineRow]) -> Part[list[Engine]]:
    names = sorted({row.name for row in rows if row.key_id})
    answers = yield from _answers(ask, HEALTH_CHECK, {}, names)
    return [_engine(row, answers.get(row.name)) for row in rows]


def _engine(row: EngineRow, answer: Answer | None) -> Engine:
    said: Mapping[str, Any] = (answer.answer if answer is not None and answer.is_ok else None) or {}
    return Engine(
        name=row.name,
        state=said.get("state", _unsaid(row, answer)),
        wanted=row.wanted,
        degraded=said.get("degraded"),
        config_version=said.get("config_version"),
        outbox_depth=said.get("outbox_depth"),
        stuck=said.get("stuck"),
        uptime_s=said.get("uptime_s"),
        version=said.get("version"),
        key_id=row.key_id,
        address=row.address,
        linked_at=row.linked_at,
        reason=row.reason,
    )


def _unsaid(row: EngineRow, answer: Answer | None) -> str:
    """Return the state of an engine that has not reported a state."""
    if row.key_id is None:
        return "no link"
    return "invalid answer" if answer is not None and _is_invalid(answer) else "no answer"


def _is_invalid(answer: Answer) -> bool:
    """Return whether the engine sent an invalid reply; the log of the server says why it is invalid."""
    return answer.is_ok is None and (answer.answer or {}).get("code") == BadReply.code


def _answers(
    ask: OperationRequest, type: str, payload: Mapping[str, Any], names: Sequence[str]
) -> Part[dict[str, Answer]]:
    """Send a request to engines by their names, and wait for the answers.

    A request that no server takes in time is never sent. If the client disconnects or may not wait, the requests that
    no server has taken are deleted at once.
    """
    if not names:
        return {}
    asked: dict[str, int] = yield lambda txn: {
        name: control_requests.ask(txn, name, type, payload, ask.actor) for name in names
    }
    try:
        return (yield from _came(asked))
    except (Left, Overloaded):
        yield lambda txn: control_requests.conclude(txn, tuple(asked.values()))
        raise


def _came(asked: Mapping[str, int]) -> Part[dict[str, Answer]]:
    """Wait for the answers to control requests.

    :param asked: the id of each request, by the engine's name.
    """
    ids = tuple(asked.values())
    yield WaitFor(control_requests.settled, ids, control_requests.TAKE_S + control_requests.ANSWER_S)
    found: dict[int, Answer] = yield lambda txn: control_requests.conclude(txn, ids)
    late = tuple(request_id for request_id, answer in found.items() if answer.is_taken and not answer.is_over)
    if late:
        # A server took the request at the last moment, or has died.
        yield WaitFor(control_requests.settled, late, control_requests.ANSWER_S)
        found.update((yield lambda txn: control_requests.conclude(txn, late)))
    return {name: found[request_id] for name, request_id in asked.items()}


def _steer(type: str, ask: OperationRequest) -> Steps[dict[str, Any]]:
    """Send one request to an engine, and reply with its answer."""
    name = ask.path_params["name"]
    if not name:
        raise NotFound(_NAMELESS)
    # A server writes the row of a new link with a short delay.
    yield WaitFor(engines.linked, (name,), SHOWN_S)
    row: EngineRow = yield lambda txn: _find(txn, name)
    if row.key_id is None:
        raise NotReady(_UNLINKED.format(name=harmless(name)))
    request_id: int = yield lambda txn: control_requests.ask(txn, name, type, ask.body, ask.actor)
    try:
        answer = (yield from _came({name: request_id}))[name]
    except S2SError as error:
        raise UnknownOutcome(f"the request was sent, but waiting for its answer failed: {error}") from None
    said = answer.answer or {}
    if answer.is_ok:
        return Reply({"engine": name, **said})
    if not answer.is_taken:
        raise NotReady(_UNTAKEN.format(name=harmless(name)))
    if answer.is_ok is False:
        raise Refused(said["code"], said["message"], {**said["details"], "engine": name})
    why = harmless(str(said.get("message", "the server that took the request did not report")))
    did = "gave an answer that is not valid" if _is_invalid(answer) else "did not answer"
    raise UnknownOutcome(f"{harmless(name)} {did}, the outcome is unknown: {why}")


_UNLINKED: Final = "no server has a link to an engine '{name}'"
_NAMELESS: Final = "an engine without a name cannot be steered: it has to give a name in its health ack"
_UNTAKEN: Final = (
    "no server took the request to an engine '{name}' in time: its link has ended, or the database holds the server up,"
    " whose log says why"
)


def _operation(verb: str, type: str, access: Access, summary: str) -> Operation[dict[str, Any]]:
    message = BY_NAME[type]
    reply = message.reply_schema.document
    return Operation(
        f"{verb}_engine",
        "POST",
        f"/v1/engines/{{name}}/{verb}",
        access,
        summary,
        {
            **reply,
            "$id": f"urn:s2s:schema:{verb}_engine.reply",
            "title": f"The answer of the engine to {type}",
            "properties": {"engine": NAME, **reply["properties"]},
            "required": ["engine", *reply["required"]],
        },
        partial(_steer, type),
        # An empty name is refused with its own error, and not as a path that does not exist.
        path_params={"name": {**NAME, "minLength": 0}},
        body=message.request_schema.document,
        refusals=(
            NotFound,
            NotReady,
            Paused,
            ShuttingDown,
            Overloaded,
            DbUnavailable,
            DeadlineExceeded,
            InternalError,
        ),
    )


LIST: Final[Operation[Page[Engine]]] = listing(
    "list_engines",
    "/v1/engines",
    "List the engines that have a link or a desired state, each with its current health",
    Engine,
    _list,
    cursor=KEY,
)
SHOW: Final[Operation[Engine]] = Operation(
    "show_engine",
    "GET",
    "/v1/engines/{name}",
    "observer",
    "Show one engine with its current health",
    Engine,
    _show,
    path_params={"name": NAME},
    refusals=(NotFound,),
)
HEALTH: Final = _operation("health", HEALTH_CHECK, "observer", "Request the health of an engine")
PAUSE_ENGINE: Final = _operation("pause", PAUSE, "operator", "Pause an engine: it begins no job until it is resumed")
RESUME_ENGINE: Final = _operation("resume", RESUME, "operator", "Resume a paused engine")
SHUT_DOWN_ENGINE: Final = _operation(
    "shutdown", SHUTDOWN, "operator", "Shut an engine down: it finishes the work in hand and ends for good"
)
SWEEP_ENGINE: Final = _operation("sweep", SWEEP, "operator", "Make an engine put pending broadcasts into its outbox")

OPERATIONS: Final[tuple[Operation[Any], ...]] = (
    LIST, SHOW, HEALTH, PAUSE_ENGINE, RESUME_ENGINE, SHUT_DOWN_ENGINE, SWEEP_ENGINE,
)  # fmt: skip
