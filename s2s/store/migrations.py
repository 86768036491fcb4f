"""Numbered SQL files, each run once and in one transaction, under an advisory lock.

A migration is a file ``sql/NNNN_name.sql``; it never changes once released. Two processes that migrate at once take
turns, and the second one finds nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib import resources
from typing import Final

from s2s.errors import SchemaError
from s2s.store.driver import Connection, Cursor, lock_key
from s2s.store.kept_rows import check_written
from s2s.store.lock_wait import PATIENCE_S, LockWait
from s2s.store.tables import config

_LOCK: Final = lock_key("migrations")

_TABLE: Final = re.compile(r"^create table (?:if not exists )?(\w+)", re.MULTILINE)
_MIGRATE: Final = "run: s2s db migrate"


@dataclass(frozen=True)
class Migration:
    """One file.

    :param name: the file's name without the suffix, such as ``0001_initial``.
    """

    version: int
    name: str
    sql: str


@dataclass(frozen=True)
class Applied:
    """One migration and when this database got it; ``None``: not yet."""

    version: int
    name: str
    applied_at: datetime | None


@cache
def available() -> tuple[Migration, ...]:
    """Read the package's files, in order."""
    files = (file for file in resources.files("s2s.store").joinpath("sql").iterdir() if file.name.endswith(".sql"))
    return tuple(
        Migration(int(file.name[:4]), file.name[:-4], file.read_text("utf-8"))
        for file in sorted(files, key=lambda file: file.name)
    )


@cache
def tables() -> frozenset[str]:
    """Return the names of the tables that the migrations make."""
    return frozenset(name for migration in available() for name in _TABLE.findall(migration.sql))


def migrate(
    conn: Connection, tell: Callable[[str], object] = lambda line: None, patience_s: float = PATIENCE_S
) -> list[str]:
    """Run what this database does not have yet, and declare the settings of this release.

    :param conn: an open connection, not in autocommit; every migration is committed.
    :param tell: see :class:`~s2s.store.lock_wait.LockWait`, as ``patience_s``.
    :returns: the names of the migrations run.
    :raises SchemaError: the database is newer than this release, or does not keep text as UTF-8.
    :raises OperatorError: other sessions held the locks for too long.
    """
    locks = LockWait(conn, tell, patience_s)
    with locks.watched():
        done = [migration.name for migration in available() if locks.run(partial(_run, migration))]
        locks.run(_declare)
    return done


def _run(migration: Migration, txn: Cursor) -> bool:
    """Run a file that this database does not have; whether it did not."""
    # Held until the COMMIT, and taken anew for every file: a waiter then sees what the other one did.
    txn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    _check_encoding(txn)
    _refuse_newer(txn)
    applied = _applied(txn)
    if migration.version in applied:
        return False
    if not applied:
        # Not where it is there: that needs a privilege, too.
        txn.execute(
            "create table if not exists s2s_migrations ("
            "version integer primary key, name text not null, applied_at timestamptz not null default now())"
        )
    txn.execute(migration.sql)
    txn.execute("insert into s2s_migrations (version, name) values (%s, %s)", (migration.version, migration.name))
    check_written(txn, "insert", "s2s_migrations")
    return True


def _declare(txn: Cursor) -> None:
    txn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    config.declare(txn)


def status(txn: Cursor) -> list[Applied]:
    """List every migration of this release and of the database, in order."""
    applied = _applied(txn)
    ours = [
        applied.pop(migration.version, Applied(migration.version, migration.name, None)) for migration in available()
    ]
    return ours + [applied[version] for version in sorted(applied)]


def check(txn: Cursor) -> None:
    """Refuse a database whose tables are not this release's.

    :raises SchemaError: it is older or newer; the text names the cure.
    """
    _check_encoding(txn)
    _refuse_newer(txn)
    applied = _applied(txn)
    missing = [migration.name for migration in available() if migration.version not in applied]
    if len(missing) == len(available()):
        raise SchemaError(f"the database has no tables of s2s yet: {_MIGRATE}")
    if missing:
        raise SchemaError(f"the database lacks {', '.join(missing)}: {_MIGRATE}")


def _applied(txn: Cursor) -> dict[int, Applied]:
    txn.execute("select to_regclass('s2s_migrations') is not null")
    if txn.fetchone() != (True,):
        return {}
    txn.execute("select version, name, applied_at from s2s_migrations order by version")
    return {row[0]: Applied(*row) for row in txn}


def _refuse_newer(txn: Cursor) -> None:
    known = available()[-1].version
    newer = [row.name for version, row in _applied(txn).items() if version > known]
    if newer:
        raise SchemaError(
            f"the database has {newer[-1]} and this release knows up to {available()[-1].name}: install a newer s2s"
        )


def _check_encoding(txn: Cursor) -> None:
    txn.execute("show server_encoding")
    encoding = (txn.fetchone() or ("",))[0]
    if encoding != "UTF8":
        raise SchemaError(f"the database keeps text as {encoding}: make one with: createdb --encoding=UTF8 NAME")
