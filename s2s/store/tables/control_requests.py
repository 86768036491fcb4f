"""Table ``steering``: control requests typed in a shell, sent by the server that has the link.

A request is taken by one server at most. One that nobody takes in time is taken by nobody: what an operator was told
did not happen must not happen later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg2.extras import Json

from s2s.protocol.catalogue import HEALTH_CHECK
from s2s.protocol.limits import Bounds
from s2s.store.driver import Cursor
from s2s.store.kept_rows import check_written, note, still_there
from s2s.store.tables import claims
from s2s.store.tables.fitting import fitting

CHANNEL: Final = "s2s_steering"
#: Notified when an answer is written down.
OVER_CHANNEL: Final = "s2s_steering_over"
#: Seconds within which a server must take a request, and then has for the engine's answer.
TAKE_S: Final = 3.0
ANSWER_S: Final = 35.0
#: After so many seconds a server that took it and is gone is not waited for.
GONE_S: Final = 6.0
#: Requests that a server takes at once, and has in hand.
MOST: Final = 256


@dataclass(frozen=True)
class Steering:
    """A request to send.

    :param engine: the engine's name.
    :param type: of the catalogue.
    :param payload: ``None``: it is longer than any frame.
    """

    request_id: int
    engine: str
    type: str
    payload: dict[str, Any] | None
    actor: str


@dataclass(frozen=True)
class Answer:
    """How far a request is.

    :param taken_by: the ``boot_id`` of the server that has sent it, or is about to.
    :param is_over: it has been answered, or the server that took it knows no answer.
    :param is_ok: the answer is the reply's payload and no refusal; ``None``: there is none.
    :param answer: the payload of the reply, or of the ``s2s.error``; ``message`` where nothing
        came, and the ``code`` of :class:`~s2s.errors.BadReply` where that was not valid.
    """

    taken_by: str | None
    is_over: bool
    is_ok: bool | None
    answer: dict[str, Any] | None

    @property
    def is_taken(self) -> bool:
        """Whether a server has sent it, or is about to."""
        return self.taken_by is not None


def ask(txn: Cursor, engine: str, type: str, payload: Mapping[str, Any], actor: str, patience_s: float = TAKE_S) -> int:
    """Ask whichever server has the link to send a request.

    :param patience_s: seconds after which no server takes it any more.
    :returns: its ``request_id``.
    """
    txn.execute(
        "insert into s2s.steering (engine, type, payload, actor, expires_at)"
        " values (%s, %s, %s, %s, now() + %s * interval '1 second') returning request_id",
        (engine, type, Json(dict(payload)), actor, patience_s),
    )
    check_written(txn, "insert", "s2s.steering")
    return int((txn.fetchone() or ())[0])


def take(
    txn: Cursor, server_boot_id: str, engines: Sequence[str], limit: int = MOST, frame_size: int = Bounds.frame_size
) -> list[Steering]:
    """Take what is asked of some engines, in order.

    :param limit: requests at most.
    :param frame_size: bytes of the longest frame.
    """
    txn.execute(
        "with asked as (select request_id from s2s.steering"  # noqa: S608 - constants
        " where taken_by is null and expires_at > now() and engine = any(%(engines)s) order by request_id"
        " limit %(limit)s for update skip locked), taken as (update s2s.steering set taken_by = %(boot_id)s"
        " where request_id in (select request_id from asked)"
        f" returning request_id, engine, type, {fitting('payload')} as payload, actor, taken_by)"
        " select asked.request_id, engine, type, payload, actor from asked left join taken"
        " on taken.request_id = asked.request_id and taken_by is not null"
        " order by request_id",
        {"engines": list(engines), "boot_id": server_boot_id, "limit": limit, "longest": frame_size},
    )
    rows = txn.fetchall()
    if any(engine is None for _, engine, *_ in rows):
        note(txn, "update", "s2s.steering")
    return [Steering(*row) for row in rows if row[1] is not None]


def answer(txn: Cursor, request_id: int, is_ok: bool | None, payload: Mapping[str, Any]) -> None:
    """Write down what the engine said.

    :param is_ok: ``None`` where it said nothing.
    """
    txn.execute(
        "update s2s.steering set is_ok = %s, answer = %s, answered_at = now() where request_id = %s",
        (is_ok, Json(dict(payload)), request_id),
    )
    if not txn.rowcount:
        still_there(txn, "update", "s2s.steering", "request_id", [request_id])


def settled(txn: Cursor, request_ids: Sequence[int]) -> set[int]:
    """Give those of some requests for which nothing is to be waited for any more.

    They are answered, or nobody took them in time, or whoever did is gone.
    """
    txn.execute(
        "select request_id, taken_by, answered_at is not null or (taken_by is null and expires_at <= now()),"
        " created_at <= now() - %s * interval '1 second' from s2s.steering where request_id = any(%s)",
        (GONE_S, list(request_ids)),
    )
    rows = txn.fetchall()
    present = claims.present(txn, {taken_by for _, taken_by, is_over, is_old in rows if is_old and not is_over})
    waiting = {row[0] for row in rows if not row[2] and (not row[3] or row[1] in present)}
    return set(request_ids) - waiting


def conclude(txn: Cursor, request_ids: Sequence[int]) -> dict[int, Answer]:
    """See what came of requests; those that no server has taken are taken back, so that they never happen."""
    txn.execute("delete from s2s.steering where request_id = any(%s) and taken_by is null", (list(request_ids),))
    txn.execute(
        "select request_id, taken_by, answered_at is not null, is_ok, answer from s2s.steering where"
        " request_id = any(%s)",
        (list(request_ids),),
    )
    found = {row[0]: Answer(*row[1:]) for row in txn}
    if any(not answer.is_taken for answer in found.values()):
        note(txn, "delete", "s2s.steering")
    # Looked at every second somewhere, and of no more use; what steers stays for a while.
    txn.execute(
        "delete from s2s.steering where request_id = any(%s) and type = %s and answered_at is not null",
        (list(request_ids), HEALTH_CHECK),
    )
    if txn.rowcount < sum(answer.is_over for answer in found.values()):
        still_there(
            txn,
            "delete",
            "s2s.steering",
            "request_id",
            request_ids,
            f"type = '{HEALTH_CHECK}' and answered_at is not null",
        )
    return {request_id: found.get(request_id, _UNTAKEN) for request_id in request_ids}


_UNTAKEN: Final = Answer(None, False, None, None)
