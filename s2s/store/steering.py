"""Table ``steering``: control requests typed in a shell, sent by the server that has the link.

A request is taken by one server at most. One that nobody takes in time is taken by nobody: what an operator was told
did not happen must not happen later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg2.extras import Json

from s2s.store.driver import Cursor

CHANNEL: Final = "s2s_steering"


@dataclass(frozen=True)
class Steering:
    """A request to send.

    :param engine: the engine's name.
    :param type: of the catalogue.
    """

    request_id: int
    engine: str
    type: str
    payload: dict[str, Any]
    actor: str


@dataclass(frozen=True)
class Answer:
    """How far a request is.

    :param taken_by: the ``boot_id`` of the server that has sent it, or is about to.
    :param is_over: it has been answered, or the server that took it knows no answer.
    :param is_ok: the answer is the reply's payload and no refusal; ``None``: there is none.
    :param answer: the payload of the reply, or of the ``s2s.error``; ``message`` alone where nothing came.
    """

    taken_by: str | None
    is_over: bool
    is_ok: bool | None
    answer: dict[str, Any] | None

    @property
    def is_taken(self) -> bool:
        """Whether a server has sent it, or is about to."""
        return self.taken_by is not None


def ask(txn: Cursor, engine: str, type: str, payload: Mapping[str, Any], actor: str, patience_s: float) -> int:
    """Ask whichever server has the link to send a request.

    :param patience_s: seconds after which no server takes it any more.
    :returns: its ``request_id``.
    """
    txn.execute(
        "insert into steering (engine, type, payload, actor, expires_at)"
        " values (%s, %s, %s, %s, now() + %s * interval '1 second') returning request_id",
        (engine, type, Json(dict(payload)), actor, patience_s),
    )
    return int((txn.fetchone() or ())[0])


def take(txn: Cursor, server_boot_id: str, engines: Sequence[str]) -> list[Steering]:
    """Take what is asked of some engines, in order."""
    txn.execute(
        "update steering set taken_by = %s where request_id in (select request_id from steering"
        " where taken_by is null and expires_at > now() and engine = any(%s) order by request_id"
        " for update skip locked) returning request_id, engine, type, payload, actor",
        (server_boot_id, list(engines)),
    )
    return sorted((Steering(*row) for row in txn), key=lambda asked: asked.request_id)


def answer(txn: Cursor, request_id: int, is_ok: bool | None, payload: Mapping[str, Any]) -> None:
    """Write down what the engine said.

    :param is_ok: ``None`` where it said nothing.
    """
    txn.execute(
        "update steering set is_ok = %s, answer = %s, answered_at = now() where request_id = %s",
        (is_ok, Json(dict(payload)), request_id),
    )


def look(txn: Cursor, request_ids: Sequence[int]) -> dict[int, Answer]:
    """See how far requests are."""
    txn.execute(
        "select request_id, taken_by, answered_at is not null, is_ok, answer from steering where request_id = any(%s)",
        (list(request_ids),),
    )
    return {row[0]: Answer(*row[1:]) for row in txn}


def withdraw(txn: Cursor, request_id: int) -> bool:
    """Take back a request: ``False`` where a server has taken it."""
    txn.execute("delete from steering where request_id = %s and taken_by is null", (request_id,))
    return txn.rowcount > 0
