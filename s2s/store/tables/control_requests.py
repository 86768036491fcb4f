"""Table ``steering``: control requests from a shell or API, sent by the server that has the link.

At most one server takes a request. A request that no server takes in time is never sent: the operator was told that it
did not happen, so it must not happen later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
#: Notified when an answer is stored.
OVER_CHANNEL: Final = "s2s_steering_over"
#: Seconds within which a server must take a request, and seconds that the server then waits for the engine's answer.
TAKE_S: Final = 3.0
ANSWER_S: Final = 35.0
#: Age of a request, in seconds, from which a caller no longer waits for a server that took it and is gone.
GONE_S: Final = 6.0
#: The most requests that a server takes at once and has in progress.
MOST: Final = 256


@dataclass(frozen=True)
class Steering:
    """A control request to send.

    :param engine: the engine's name.
    :param key_id: the key of the engine's link; ``None``: the newest link of the name, whatever its key.
    :param type: a request type of the catalogue.
    :param payload: ``None``: it is longer than any frame.
    """

    request_id: int
    engine: str
    key_id: str | None
    type: str
    payload: dict[str, Any] | None
    actor: str


@dataclass(frozen=True)
class Answer:
    """The state of a control request.

    :param taken_by: the ``boot_id`` of the server that has sent the request or is about to; ``None``: not taken.
    :param is_over: an answer is stored, or the server that took the request has recorded that there is none.
    :param is_ok: whether the engine replied, as opposed to refused; ``None``: there is no answer.
    :param answer: the payload of the reply, or of the ``s2s.error``. Without an answer it has a ``message``; for an
        invalid answer also the ``code`` of :class:`~s2s.errors.BadReply`.
    """

    taken_by: str | None
    is_over: bool
    is_ok: bool | None
    answer: dict[str, Any] | None

    @property
    def is_taken(self) -> bool:
        """Whether a server has sent the request or is about to."""
        return self.taken_by is not None


def ask(
    txn: Cursor,
    engine: str,
    type: str,
    payload: Mapping[str, Any],
    actor: str,
    patience_s: float = TAKE_S,
    key_id: str | None = None,
) -> int:
    """Store a request for the server that has the link to the engine.

    :param patience_s: seconds after which no server takes the request any more.
    :param key_id: the key of that link; ``None``: the newest link of the name, whatever its key.
    :returns: its ``request_id``.
    """
    txn.execute(
        "insert into s2s.steering (engine, key_id, type, payload, actor, expires_at)"
        " values (%s, %s, %s, %s, %s, now() + %s * interval '1 second') returning request_id",
        (engine, key_id, type, Json(dict(payload)), actor, patience_s),
    )
    check_written(txn, "insert", "s2s.steering")
    return int((txn.fetchone() or ())[0])


def take(
    txn: Cursor,
    server_boot_id: str,
    links: Collection[tuple[str, str]],
    limit: int = MOST,
    frame_size: int = Bounds.frame_size,
) -> list[Steering]:
    """Take the open requests to the engines of the given links, in order.

    :param links: the name and the key of each link.
    :param limit: the most requests to take.
    :param frame_size: bytes of the longest frame.
    """
    txn.execute(
        "with asked as (select request_id from s2s.steering"  # noqa: S608 - constants
        " where taken_by is null and expires_at > now() and exists (select from"
        " unnest(%(names)s::text[], %(keys)s::text[]) as l (name, key_id)"
        " where l.name = engine and l.key_id = coalesce(steering.key_id, l.key_id)) order by request_id"
        " limit %(limit)s for update skip locked), taken as (update s2s.steering set taken_by = %(boot_id)s"
        " where request_id in (select request_id from asked)"
        f" returning request_id, engine, key_id, type, {fitting('payload')} as payload, actor, taken_by)"
        " select asked.request_id, engine, key_id, type, payload, actor from asked left join taken"
        " on taken.request_id = asked.request_id and taken_by is not null"
        " order by request_id",
        {
            "names": [name for name, _ in links],
            "keys": [key_id for _, key_id in links],
            "boot_id": server_boot_id,
            "limit": limit,
            "longest": frame_size,
        },
    )
    rows = txn.fetchall()
    if any(engine is None for _, engine, *_ in rows):
        note(txn, "update", "s2s.steering")
    return [Steering(*row) for row in rows if row[1] is not None]


def answer(txn: Cursor, request_id: int, is_ok: bool | None, payload: Mapping[str, Any]) -> None:
    """Store the engine's answer to a request.

    :param is_ok: ``None``: the engine did not answer.
    """
    txn.execute(
        "update s2s.steering set is_ok = %s, answer = %s, answered_at = now() where request_id = %s",
        (is_ok, Json(dict(payload)), request_id),
    )
    if not txn.rowcount:
        still_there(txn, "update", "s2s.steering", "request_id", [request_id])


def settled(txn: Cursor, request_ids: Sequence[int]) -> set[int]:
    """Return the given requests that need no more waiting.

    Such a request is answered, or no server took it in time, or the server that took it is gone.
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
    """Return the state of requests; remove the requests that no server has taken, so that they never happen."""
    txn.execute("delete from s2s.steering where request_id = any(%s) and taken_by is null", (list(request_ids),))
    txn.execute(
        "select request_id, taken_by, answered_at is not null, is_ok, answer from s2s.steering where"
        " request_id = any(%s)",
        (list(request_ids),),
    )
    found = {row[0]: Answer(*row[1:]) for row in txn}
    if any(not answer.is_taken for answer in found.values()):
        note(txn, "delete", "s2s.steering")
    # A health check may come every second and is not needed any more; other requests stay until retention removes them.
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
