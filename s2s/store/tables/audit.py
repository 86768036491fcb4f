"""Table ``audit``: actors, their actions and the results (docs/protocol.rst, "Audit").

Triggers write most entries, in the transaction of the change, also for changes by plain SQL: orders, settings, keys,
desired states of engines and control requests. The triggers read the actor from the transaction: see :func:`sign`.
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

#: The maximum size of the params that :func:`cut` keeps whole, in bytes of JSON.
KEPT_BYTES: Final = 2000


@dataclass(frozen=True)
class Entry:
    """One entry.

    :param actor: ``cli:`` and a user's name, ``key:`` and a ``key_id``, or the database user.
    :param action: a message type, or a table and a verb.
    :param subject: the object of the action: an ``order_id``, a setting, a ``key_id``, an engine's name.
    :param result: ``None`` if the result is not known yet, or is the change itself.
    """

    audit_id: int
    at: datetime
    actor: str
    action: str
    subject: str
    params: dict[str, Any]
    result: dict[str, Any] | None


def sign(txn: Cursor, actor: str, action: str = "", *, for_session: bool = False) -> None:
    """Set the actor and the action of the further changes of this transaction, for the audit.

    :param action: the action that the changes are part of, such as ``keys.activate``; empty: each change has its own.
    :param for_session: set them for the whole session. Never use it on a connection of a pool.
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

    :param actor: the actor; ``None``: the actor that :func:`sign` has set.
    """
    txn.execute(
        "insert into s2s.audit (actor, action, subject, params, result) values (coalesce(%s, s2s.actor()),"
        " %s, %s, %s, %s)",
        (actor, action, subject, Json(dict(params)), None if result is None else Json(dict(result))),
    )
    check_written(txn, "insert", "s2s.audit")


def cut(params: Mapping[str, Any], written: bytes) -> Mapping[str, Any]:
    """Return params, or the first :data:`KEPT_BYTES` of their JSON if they are larger.

    :param written: the params as JSON.
    """
    return params if len(written) <= KEPT_BYTES else {"cut": written[:KEPT_BYTES].decode("utf-8", "ignore")}


#: The list of entries, with filters by ``subject``, ``actor`` and ``action``.
LISTED: Final = Listed(Entry, "s2s.audit", "audit_id", indexed=("subject", "actor", "action"))
