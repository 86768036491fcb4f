"""Table ``s2s_database``: the id of this database, in every ``idem_key`` that s2s makes itself.

Serial numbers and due times repeat in another database. A server that takes pushes from two databases, or from one that
was rebuilt, would take two different commands for one. In a database that was restored from a dump they repeat together
with the id, so that a key contains the digest of its content as well.
"""

from __future__ import annotations

import hashlib

from s2s.store.driver import Cursor
from s2s.store.kept_rows import refusal


def database_id(txn: Cursor) -> str:
    """Return the id of this database. A missing row is made anew, with a new id."""
    txn.execute("select database_id from s2s.database")
    row = txn.fetchone()
    if row is None:
        txn.execute("insert into s2s.database default values on conflict (only_row) do nothing")
        # In a statement of its own, which sees what another session has just inserted.
        txn.execute("select database_id from s2s.database")
        row = txn.fetchone()
    if row is None:
        raise refusal(txn, "insert", "s2s.database")
    return str(row[0])


def own_key(database: str, kind: str, *parts: object) -> str:
    """Return the ``idem_key`` of something that s2s names itself, or the start of it, to which :func:`digest` belongs.

    :param database: of :func:`database_id`.
    :param kind: such as ``broadcast``, or the name of a job.
    :param parts: tell it from all others of its kind in this database.
    """
    return ":".join(map(str, (kind, database, *parts)))


def digest(*content: object) -> str:
    """Return what tells a content from any other under the same number.

    :param content: strings, bytes, numbers and ``None``.
    """
    return hashlib.sha256(ascii(content).encode()).hexdigest()[:12]
