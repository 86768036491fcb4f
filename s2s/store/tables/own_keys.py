"""Table ``s2s.database``: the id of this database, which is part of every ``idem_key`` that s2s makes itself.

Serial numbers and due times repeat in other databases. Without the id, a server that receives pushes from two
databases, or from a rebuilt one, would take two different commands for the same command. In a database restored from a
dump, the numbers repeat together with the id, so a key also contains the digest of its content.

A copy of a database has the id of its original. The row therefore contains the place where the id was made.
"""

from __future__ import annotations

import hashlib

from s2s.store.driver import Cursor
from s2s.store.kept_rows import check_written, refusal


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


def copied(txn: Cursor) -> str:
    """Return a line with the cure if the id of this database was made in another place; empty: it was not.

    The line is also due after a move, such as by pg_upgrade or a restore, and then the id should stay. Only an operator
    knows whether the original still exists, so the line refuses nothing.
    """
    txn.execute("select database_id from s2s.database where made_in <> s2s.place()")
    row = txn.fetchone()
    if row is None:
        return ""
    return (
        f"this database is a copy of another one, or was restored or moved: its id {row[0]} was made in another place."
        " Two databases with one id must not push to one server, which would take commands of one for repetitions of"
        " the other's. If the original still exists, run: s2s db fix-id --new; if not, run: s2s db fix-id --keep"
    )


def renew(txn: Cursor) -> tuple[str, str]:
    """Give this database a new id, made here.

    :returns: the old id and the new one. Keys that exist already keep the old one.
    """
    old = database_id(txn)
    txn.execute("update s2s.database set database_id = default, made_in = default")
    check_written(txn, "update", "s2s.database")
    new = database_id(txn)
    # A trigger may return the old row, which counts as written.
    if new == old:
        raise refusal(txn, "update", "s2s.database")
    return old, new


def keep(txn: Cursor) -> str:
    """Keep the id of this database, as if it had been made here.

    :returns: the id.
    """
    kept = database_id(txn)
    txn.execute("update s2s.database set made_in = default")
    check_written(txn, "update", "s2s.database")
    if copied(txn):
        raise refusal(txn, "update", "s2s.database")
    return kept


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
