"""Table ``s2s.database``: the id of this database, which is part of every ``idem_key`` that s2s makes itself.

Serial numbers and due times repeat in other databases. Without the id, a server that receives pushes from two
databases, or from a rebuilt one, would take two different commands for the same command. In a database restored from a
dump, the numbers repeat together with the id, so a key also contains the digest of its content.
"""

from __future__ import annotations

import hashlib

from s2s.store.driver import Cursor
from s2s.store.kept_rows import refusal


def database_id(txn: Cursor) -> str:
    """Return the id of this database. A missing row is created again, with a new id."""
    txn.execute("select database_id from s2s.database")
    row = txn.fetchone()
    if row is None:
        txn.execute("insert into s2s.database default values on conflict (only_row) do nothing")
        # A separate statement, which sees a row that another session has just inserted.
        txn.execute("select database_id from s2s.database")
        row = txn.fetchone()
    if row is None:
        raise refusal(txn, "insert", "s2s.database")
    return str(row[0])


def own_key(database: str, kind: str, *parts: object) -> str:
    """Return an ``idem_key`` that s2s makes itself, or its start, to which the caller adds a :func:`digest`.

    :param database: the result of :func:`database_id`.
    :param kind: the kind, such as ``broadcast``, or the name of a job.
    :param parts: identify the command among all of its kind in this database.
    """
    return ":".join(map(str, (kind, database, *parts)))


def digest(*content: object) -> str:
    """Return a short hash that distinguishes a content from others under the same number.

    :param content: strings, bytes, numbers and ``None``.
    """
    return hashlib.sha256(ascii(content).encode()).hexdigest()[:12]
