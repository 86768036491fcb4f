"""Control of the engines, through the server that has the link (docs/protocol.rst, "Proof and control requests")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from s2s.admin.operations.operation import (
    Left,
    Operation,
    OperationReply,
    OperationRequest,
    OperationSteps,
    Part,
    Rule,
    WaitFor,
)
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

_KEYS: Final[Rule] = {
    "type": "array",
    "items": {"type": "string"},
    "description": "The keys of all engines of this name, each of which has done it; absent if there is only one.",
}

#: The name and the key of an engine's link.
_Link = tuple[str, str]

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


def _list(ask: OperationRequest) -> OperationSteps[Page[Engine]]:
    """Ask each engine of the page for its health."""
    rows: Page[EngineRow] = yield partial(_page, ask.query["limit"], ask.query.get("cursor"))
    engines_now = yield from _with_health(ask, rows.items)
    return OperationReply(Page(engines_now, rows.next_cursor))


def _page(limit: int, cursor: str | None, txn: Cursor) -> Page[EngineRow]:
    found = engines.list_engines(txn)
    return page(lambda limit, before: after_key(found, _key, limit, before), _key, limit, cursor)


def _key(row: EngineRow) -> str:
    return f"{row.name}\n{row.key_id or ''}"


def _show(ask: OperationRequest) -> OperationSteps[Engine]:
    found: list[EngineRow] = yield lambda txn: _find(txn, ask.path_params["name"])
    # Of several, the one whose link is the newest.
    row = max(found, key=_since)
    [engine] = yield from _with_health(ask, [row])
    return OperationReply(engine)


def _find(txn: Cursor, name: str) -> list[EngineRow]:
    """Return the engines of this name: several if the name stands under several keys."""
    found = [row for row in engines.list_engines(txn) if row.name == name]
    if not found:
        raise NotFound(_UNLINKED.format(name=harmless(name)))
    return found


def _since(row: EngineRow) -> float:
    return row.linked_at.timestamp() if row.linked_at else 0.0


def _links(rows: Sequence[EngineRow]) -> list[_Link]:
    """Return the links over which requests to these engines go: one for each process.

    The older one of two links of one process, as after a rotation of its key, may be dead without having been detected.
    """
    newest: dict[tuple[str, str | None, str | None], _Link] = {}
    for row in sorted(rows, key=_since):
        if row.key_id is not None:
            newest[row.name, row.boot_id, None if row.boot_id else row.key_id] = (row.name, row.key_id)
    return sorted(set(newest.values()))


def _with_health(ask: OperationRequest, rows: Sequence[EngineRow]) -> Part[list[Engine]]:
    answers = yield from _answers(ask, _links(rows))
    return [_engine(row, answers.get((row.name, str(row.key_id)))) for row in rows]


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


def _answers(ask: OperationRequest, links: Sequence[_Link]) -> Part[dict[_Link, Answer]]:
    """Send a health check over each link, and wait for the answers.

    A request that no server takes in time is never sent. If the client disconnects or may not wait, the requests that
    no server has taken are deleted at once.
    """
    if not links:
        return {}
    asked: dict[_Link, int] = yield lambda txn: {
        (name, key_id): control_requests.ask(txn, name, HEALTH_CHECK, {}, ask.actor, key_id=key_id)
        for name, key_id in links
    }
    try:
        return (yield from _came(asked))
    except (Left, Overloaded):
        yield lambda txn: control_requests.conclude(txn, tuple(asked.values()))
        raise


def _came(asked: Mapping[_Link, int]) -> Part[dict[_Link, Answer]]:
    """Wait for the answers to control requests.

    :param asked: the id of each request, by its link.
    """
    ids = tuple(asked.values())
    yield WaitFor(control_requests.settled, ids, control_requests.TAKE_S + control_requests.ANSWER_S)
    found: dict[int, Answer] = yield lambda txn: control_requests.conclude(txn, ids)
    late = tuple(request_id for request_id, answer in found.items() if answer.is_taken and not answer.is_over)
    if late:
        # A server took the request at the last moment, or has died.
        yield WaitFor(control_requests.settled, late, control_requests.ANSWER_S)
        found.update((yield lambda txn: control_requests.conclude(txn, late)))
    return {link: found[request_id] for link, request_id in asked.items()}


def _steer(type: str, ask: OperationRequest) -> OperationSteps[dict[str, Any]]:
    """Send a request to each engine of a name, and reply with the answer."""
    name = ask.path_params["name"]
    if not name:
        raise NotFound(_NAMELESS)
    # A server writes the row of a new link with a short delay.
    yield WaitFor(engines.linked, (name,), SHOWN_S)
    rows: list[EngineRow] = yield lambda txn: _find(txn, name)
    links = _links(rows)
    if not links:
        raise NotReady(_UNLINKED.format(name=harmless(name)))
    asked: dict[_Link, int] = yield lambda txn: {
        (name, key_id): control_requests.ask(txn, name, type, ask.body, ask.actor, key_id=key_id) for _, key_id in links
    }
    try:
        answers = yield from _came(asked)
    except S2SError as error:
        raise UnknownOutcome(f"the request was sent, but waiting for its answer failed: {error}") from None
    return OperationReply(_together(name, {key_id: _outcome(name, answer) for (_, key_id), answer in answers.items()}))


def _outcome(name: str, answer: Answer) -> Mapping[str, Any] | S2SError:
    """Return the answer of one engine, or the error that stands for it."""
    said = answer.answer or {}
    if answer.is_ok:
        return said
    if not answer.is_taken:
        return NotReady(_UNTAKEN.format(name=harmless(name)))
    if answer.is_ok is False:
        return Refused(said["code"], said["message"], {**said["details"], "engine": name})
    why = harmless(str(said.get("message", "the server that took the request did not report")))
    did = "gave an answer that is not valid" if _is_invalid(answer) else "did not answer"
    return UnknownOutcome(f"{harmless(name)} {did}, the outcome is unknown: {why}")


def _together(name: str, outcomes: Mapping[str, Mapping[str, Any] | S2SError]) -> dict[str, Any]:
    """Return the reply for all engines of a name.

    :param outcomes: by the key of each engine.
    :raises S2SError: not all of them have fulfilled the request.
    """
    errors = {key_id: outcome for key_id, outcome in outcomes.items() if isinstance(outcome, S2SError)}
    if len(outcomes) == 1:
        for error in errors.values():
            raise error
    elif errors:
        each = "; ".join(f"key {harmless(key_id)}: {errors.get(key_id, 'done')}" for key_id in outcomes)
        raise UnknownOutcome(
            f"the name {harmless(name)} stands for {len(outcomes)} engines, and not all have done it: {each}"
        )
    said = [outcome for outcome in outcomes.values() if not isinstance(outcome, S2SError)]
    together: dict[str, Any] = {"engine": name, **said[0]}
    if "queued" in together:
        together["queued"] = sum(each["queued"] for each in said)
    return together if len(said) == 1 else {**together, "keys": list(outcomes)}


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
            "properties": {"engine": NAME, "keys": _KEYS, **reply["properties"]},
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
