"""Table ``audit``: who did what, and what came of it (docs/protocol.rst, "Audit").

Triggers write most of it, in the transaction of the change itself and by whatever means it is made: orders, settings,
keys, what is wanted of engines and what was asked of them. They ask the transaction who acts: see :func:`sign`.
Another trigger refuses to change or remove an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from psycopg2.extras import Json

from s2s.store.driver import Cursor
from s2s.store.kept_rows import check_written
from s2s.store.tables.lists import Listed

#: Of what was asked so much is kept, in bytes of its JSON.
KEPT_BYTES: Final = 2000


@dataclass(frozen=True)
class Entry:
    """One entry.

    :param actor: ``cli:`` and a user's name, ``key:`` and a ``key_id``, or the database's own user.
    :param action: a message type, or a table and a verb.
    :param subject: what it was done to: an ``order_id``, a setting, a ``key_id``, an engine's name.
    :param result: ``None`` where it is not known yet, or is the change itself.
    """

    audit_id: int
    at: datetime
    actor: str
    action: str
    subject: str
    params: dict[str, Any]
    result: dict[str, Any] | None


def sign(txn: Cursor, actor: str, action: str = "", *, for_session: bool = False) -> None:
    """Say who does what this transaction does, from here on.

    :param action: what all of it is part of, such as ``keys.activate``; without it each change is called by itself.
    :param for_session: say it of all that follows on this connection: never on one of a pool.
    """
    txn.execute(
        "select set_config('s2s.actor', %(actor)s, %(local)s), set_config('s2s.action', %(action)s, %(local)s)",
        {"actor": actor, "action": action, "local": not for_session},
    )


def write(
    txn: Cursor,
    action: str,
    subject: str,
    params: Mapping[str, Any],
    result: Mapping[str, Any] | None = None,
    actor: str | None = None,
) -> None:
    """Write an entry that no trigger writes.

    :param actor: whoever the transaction was signed by, if left out.
    """
    txn.execute(
        "insert into s2s.audit (actor, action, subject, params, result) values (coalesce(%s, s2s.actor()),"
        " %s, %s, %s, %s)",
        (actor, action, subject, Json(dict(params)), None if result is None else Json(dict(result))),
    )
    check_written(txn, "insert", "s2s.audit")


def cut(params: Mapping[str, Any], written: bytes) -> Mapping[str, Any]:
    """Give params, or as much of them as is kept.

    :param written: the same as JSON.
    """
    return params if len(written) <= KEPT_BYTES else {"cut": written[:KEPT_BYTES].decode("utf-8", "ignore")}


#: By ``subject``, ``actor`` and ``action``.
LISTED: Final = Listed(Entry, "s2s.audit", "audit_id", indexed=("subject", "actor", "action"))
