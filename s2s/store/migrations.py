"""Migrations are numbered SQL files. All pending ones run in one transaction, under an advisory lock.

A migration is a file ``sql/SCHEMA/NNNN_name.sql``; it never changes once released. It qualifies its tables with their
schema, which is created first. If two processes migrate at once, the second one waits and then finds nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Final

import psycopg2
from psycopg2 import sql
from psycopg2.errors import DeadlockDetected, LockNotAvailable

from s2s.errors import SchemaError, StatementRefused
from s2s.store import sqlstate
from s2s.store.driver import Connection, Cursor, lock_key, translate_error
from s2s.store.kept_rows import check_written
from s2s.store.lock_wait import PATIENCE_S, LockWait
from s2s.store.tables import config

_LOCK: Final = lock_key("migrations")

_TABLE: Final = re.compile(r"^create table (?:if not exists )?([\w.]+)", re.MULTILINE)
_MIGRATE: Final = "run: s2s db migrate"
#: The migrations of these schemas run in this order.
SCHEMAS: Final = ("s2s", "s2s_world")


@dataclass(frozen=True)
class Migration:
    """One migration file.

    :param schema: the schema of its tables.
    :param version: its number, from 1 in each schema.
    :param name: the file's name without the suffix, such as ``0001_initial``.
    """

    schema: str
    version: int
    name: str
    sql: str

    def __str__(self) -> str:
        return f"{self.schema}/{self.name}"


@dataclass(frozen=True)
class Applied:
    """One migration, and the time at which it was applied to this database; ``None``: not yet."""

    schema: str
    version: int
    name: str
    applied_at: datetime | None

    def __str__(self) -> str:
        return f"{self.schema}/{self.name}"


class MigrationFailed(SchemaError):
    """A migration failed, and no pending migration was applied."""


@cache
def available() -> tuple[Migration, ...]:
    """Return the migrations of the package, in order."""
    directory = resources.files("s2s.store").joinpath("sql")
    return tuple(
        Migration(schema, int(file.name[:4]), file.name[:-4], file.read_text("utf-8"))
        for schema in SCHEMAS
        for file in sorted(directory.joinpath(schema).iterdir(), key=lambda file: file.name)
        if file.name.endswith(".sql")
    )


@cache
def tables() -> frozenset[str]:
    """Return the names of the tables that the migrations create, with their schemas."""
    return frozenset(name for migration in available() for name in _TABLE.findall(migration.sql))


def migrate(
    conn: Connection, tell: Callable[[str], object] = lambda line: None, patience_s: float = PATIENCE_S
) -> list[str]:
    """Run all pending migrations, or none, and declare the settings of this release.

    :param conn: an open connection, not in autocommit; the migrations are committed.
    :param tell: see :class:`~s2s.store.lock_wait.LockWait`, also for ``patience_s``.
    :returns: the migrations that ran.
    :raises SchemaError: the database is newer than this release, or its encoding is not UTF-8.
    :raises MigrationFailed: a migration failed.
    :raises OperatorError: other sessions held the locks for too long.
    """
    locks = LockWait(conn, tell, patience_s)
    with locks.watched():
        return locks.run(_run)


def _run(txn: Cursor) -> list[str]:
    # Held until the COMMIT, so that a process that waits for it sees the migrations of the other one.
    txn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    _check_encoding(txn)
    _refuse_newer(txn)
    applied = _applied(txn)
    missing = [migration for migration in available() if (migration.schema, migration.version) not in applied]
    if missing:
        for schema in SCHEMAS:
            _make_schema(txn, schema)
        # Skipped if the table exists: "if not exists" needs the privilege to create, too.
        if not applied:
            txn.execute(
                "create table if not exists s2s.migrations (schema text not null, version integer not null,"
                " name text not null, applied_at timestamptz not null default now(), primary key (schema, version))"
            )
    for migration in missing:
        _apply(txn, migration)
    config.declare(txn)
    return [str(migration) for migration in missing]


def _make_schema(txn: Cursor, schema: str) -> None:
    # "create schema if not exists" needs the privilege to create a schema, even if it exists.
    txn.execute("select to_regnamespace(%s) is null", (schema,))
    if txn.fetchone() == (True,):
        txn.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))


def _apply(txn: Cursor, migration: Migration) -> None:
    try:
        txn.execute(migration.sql)
    except psycopg2.Error as error:
        refused = translate_error(error, txn.connection)
        # The caller tries again after a lock conflict, and a lost connection is not a fault of the file.
        if isinstance(error, LockNotAvailable | DeadlockDetected) or not isinstance(refused, StatementRefused):
            raise
        raise MigrationFailed(
            f"the migration {migration} failed, and none of this release was applied: {sqlstate.with_cure(refused)}"
        ) from error
    txn.execute(
        "insert into s2s.migrations (schema, version, name) values (%s, %s, %s)",
        (migration.schema, migration.version, migration.name),
    )
    check_written(txn, "insert", "s2s.migrations")


def status(txn: Cursor) -> list[Applied]:
    """Return every migration of this release and of the database, in order."""
    applied = _applied(txn)
    ours = [
        applied.pop((each.schema, each.version), Applied(each.schema, each.version, each.name, None))
        for each in available()
    ]
    return ours + [applied[key] for key in sorted(applied)]


def check(txn: Cursor) -> None:
    """Refuse a database whose migrations are not those of this release.

    :raises SchemaError: the database is older or newer, or its encoding is not UTF-8; the text names the cure.
    """
    _check_encoding(txn)
    _refuse_newer(txn)
    applied = _applied(txn)
    missing = [str(each) for each in available() if (each.schema, each.version) not in applied]
    if len(missing) == len(available()):
        raise SchemaError(f"the database has no tables of s2s yet: {_MIGRATE}")
    if missing:
        raise SchemaError(f"the database lacks {', '.join(missing)}: {_MIGRATE}")


def is_visible(txn: Cursor) -> bool:
    """Return whether this user has USAGE on the existing schemas of s2s; without it, names in them do not resolve."""
    txn.execute(
        "select coalesce(bool_and(has_schema_privilege(oid, 'usage')), true) from pg_namespace where nspname = any(%s)",
        (list(SCHEMAS),),
    )
    return txn.fetchone() == (True,)


def _applied(txn: Cursor) -> dict[tuple[str, int], Applied]:
    if not is_visible(txn):
        return {}
    txn.execute("select to_regclass('s2s.migrations') is not null")
    if txn.fetchone() != (True,):
        return {}
    txn.execute("select schema, version, name, applied_at from s2s.migrations order by schema, version")
    return {(row[0], row[1]): Applied(*row) for row in txn}


def _refuse_newer(txn: Cursor) -> None:
    known = {each.schema: each for each in available()}
    for each in _applied(txn).values():
        if each.schema in known and each.version > known[each.schema].version:
            raise SchemaError(
                f"the database has {each} and this release knows up to {known[each.schema]}: install a newer s2s"
            )


def _check_encoding(txn: Cursor) -> None:
    txn.execute("show server_encoding")
    encoding = (txn.fetchone() or ("",))[0]
    if encoding != "UTF8":
        raise SchemaError(f"the database has the encoding {encoding}: create one with: createdb --encoding=UTF8 NAME")
