"""Migrations are numbered SQL files. All pending ones run in one transaction, under an advisory lock.

A migration is a file ``sql/NNNN_name.sql`` of a package; it never changes once released. The migrations of s2s qualify
their tables with the schema ``s2s``; those of a plug-in run with the plug-in's own schema as the search path. All
schemas are created first. If two processes migrate at once, the second one waits and then finds nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Final

import psycopg2
from psycopg2 import sql
from psycopg2.errors import DeadlockDetected, LockNotAvailable
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from s2s.errors import OperatorError, SchemaError, StatementRefused, one_line
from s2s.protocol.settings import SETTINGS, Setting
from s2s.store import sqlstate
from s2s.store.driver import Connection, Cursor, lock_key, translate_error
from s2s.store.kept_rows import check_written
from s2s.store.lock_wait import PATIENCE_S, LockWait
from s2s.store.tables import config

_LOCK: Final = lock_key("migrations")

_TABLE: Final = re.compile(r"^create table (?:if not exists )?([\w.]+)", re.MULTILINE)
_MIGRATE: Final = "run: s2s db migrate"
#: The search paths of a migration: names of a plug-in need no schema.
_OWN_PATH: Final = "set local search_path = pg_catalog, pg_temp"
_PLUGIN_PATH: Final = "set local search_path = {}, pg_temp"
#: A schema of a plug-in.
_SCHEMA: Final = re.compile(r"(?!pg_|s2s$|public$|information_schema$)[a-z][a-z0-9_]{0,62}")
_FILE: Final = re.compile(r"([0-9]{4})_[a-z0-9_]+\.sql")


@dataclass(frozen=True)
class Migrations:
    """The migrations of a package, which belong to one schema of the database.

    :param schema: the name of the schema, which no other package uses.
    :param package: the package that contains the directory.
    :param directory: the directory of the files ``NNNN_name.sql``, whose numbers begin with 0001.
    """

    schema: str
    package: str
    directory: str = "sql"

    def read(self) -> tuple[Migration, ...]:
        """Return the migrations, in order.

        :raises OperatorError: the schema or a file has a wrong name, or there is no file.
        """
        return _read(self)


#: The migrations of s2s itself.
OWN: Final = Migrations("s2s", "s2s.store")


def check_declaration(declared: Migrations) -> None:
    """Refuse a declaration of a plug-in that cannot be used.

    :raises OperatorError: the schema or a file has a wrong name, or there is no file.
    """
    if not _SCHEMA.fullmatch(declared.schema):
        raise OperatorError(
            f"its schema is {declared.schema!r}: write a name as [a-z][a-z0-9_]{{0,62}}, other than s2s, public and"
            " those of PostgreSQL"
        )
    declared.read()


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


_ENDS: Final = (
    "it ends the transaction of all migrations, as by COMMIT: its changes before that stay, and it counts as not"
    " applied: undo them by hand, and remove the statement from the file"
)


class MigrationFailed(SchemaError):
    """A migration failed, and no pending migration was applied."""


@cache
def _read(declared: Migrations) -> tuple[Migration, ...]:
    directory = resources.files(declared.package).joinpath(declared.directory)
    files = directory.iterdir() if directory.is_dir() else ()
    names = sorted(file.name for file in files if file.name.endswith(".sql"))
    for number, name in enumerate(names, 1):
        match = _FILE.fullmatch(name)
        if match is None or int(match[1]) != number:
            raise OperatorError(f"the file {name} in {directory} has no place: its name should be {number:04}_NAME.sql")
    if not names:
        raise OperatorError(f"there is no file NNNN_NAME.sql in {directory}: add one, and to the package data too")
    return tuple(
        Migration(declared.schema, number, name[:-4], directory.joinpath(name).read_text("utf-8"))
        for number, name in enumerate(names, 1)
    )


def available(plugins: Iterable[Migrations] = ()) -> tuple[Migration, ...]:
    """Return the migrations of s2s and of plug-ins, in the order in which they run."""
    return tuple(migration for declared in (OWN, *plugins) for migration in declared.read())


def tables(plugins: Iterable[Migrations] = ()) -> frozenset[str]:
    """Return the names of the tables that the migrations create, with their schemas."""
    return frozenset(
        name if "." in name else f"{migration.schema}.{name}"
        for migration in available(plugins)
        for name in _TABLE.findall(migration.sql)
    )


def migrate(
    conn: Connection,
    plugins: Sequence[Migrations] = (),
    settings: Collection[Setting] = SETTINGS,
    *,
    tell: Callable[[str], object] = lambda line: None,
    patience_s: float = PATIENCE_S,
) -> list[str]:
    """Run all pending migrations, or none, and declare the settings of this release.

    :param conn: an open connection, not in autocommit; the migrations are committed.
    :param plugins: the migrations of the installed plug-ins.
    :param settings: the settings of s2s and of the installed plug-ins.
    :param tell: see :class:`~s2s.store.lock_wait.LockWait`, also for ``patience_s``.
    :returns: the migrations that ran.
    :raises SchemaError: the database is newer than this release, or its encoding is not UTF-8.
    :raises MigrationFailed: a migration failed.
    :raises OperatorError: other sessions held the locks for too long.
    """
    locks = LockWait(conn, tell, patience_s)
    with locks.watched():
        return locks.run(lambda txn: _run(txn, plugins, settings))


def _run(txn: Cursor, plugins: Sequence[Migrations], settings: Collection[Setting]) -> list[str]:
    # Held until the COMMIT, so that a process that waits for it sees the migrations of the other one.
    txn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    _check_encoding(txn)
    _refuse_newer(txn, plugins)
    applied = _applied(txn)
    missing = [each for each in available(plugins) if (each.schema, each.version) not in applied]
    if missing:
        for declared in (OWN, *plugins):
            _make_schema(txn, declared.schema)
        # Skipped if the table exists: "if not exists" needs the privilege to create, too.
        if not applied:
            txn.execute(
                "create table if not exists s2s.migrations (schema text not null, version integer not null,"
                " name text not null, applied_at timestamptz not null default now(), primary key (schema, version))"
            )
    for migration in missing:
        _apply(txn, migration)
    config.declare(txn, settings)
    return [str(migration) for migration in missing]


def _make_schema(txn: Cursor, schema: str) -> None:
    # "create schema if not exists" needs the privilege to create a schema, even if it exists.
    txn.execute("select to_regnamespace(%s) is null", (schema,))
    if txn.fetchone() == (True,):
        txn.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))


def _apply(txn: Cursor, migration: Migration) -> None:
    try:
        before = _transaction(txn)
        if migration.schema != OWN.schema:
            txn.execute(sql.SQL(_PLUGIN_PATH).format(sql.Identifier(migration.schema)))
        txn.execute(migration.sql)
        txn.execute(_OWN_PATH)
        if _transaction(txn) != before:
            raise MigrationFailed(f"the migration {migration} {_ENDS}")
    except psycopg2.Error as error:
        if txn.connection.info.transaction_status == TRANSACTION_STATUS_IDLE:
            raise MigrationFailed(f"the migration {migration} failed ({one_line(error)}), and {_ENDS}") from error
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


def _transaction(txn: Cursor) -> int:
    txn.execute("select txid_current()")
    ((xid,),) = txn.fetchall()
    return int(xid)


def status(txn: Cursor, plugins: Iterable[Migrations] = ()) -> list[Applied]:
    """Return every migration of this release, of plug-ins and of the database, in order."""
    applied = _applied(txn)
    ours = [
        applied.pop((each.schema, each.version), Applied(each.schema, each.version, each.name, None))
        for each in available(plugins)
    ]
    return ours + [applied[key] for key in sorted(applied)]


def check(txn: Cursor, plugins: Sequence[Migrations] = ()) -> None:
    """Refuse a database whose migrations are not those of this release and of plug-ins.

    :raises SchemaError: the database is older or newer, or its encoding is not UTF-8; the text names the cure.
    """
    _check_encoding(txn)
    _refuse_newer(txn, plugins)
    applied = _applied(txn)
    missing = [str(each) for each in available(plugins) if (each.schema, each.version) not in applied]
    if not applied:
        raise SchemaError(f"the database has no tables of s2s yet: {_MIGRATE}")
    if missing:
        raise SchemaError(f"the database lacks {', '.join(missing)}: {_MIGRATE}")


def is_visible(txn: Cursor) -> bool:
    """Return whether this user has USAGE on the schema of s2s, if it exists; without it, names in it do not resolve."""
    txn.execute(
        "select coalesce(bool_and(has_schema_privilege(oid, 'usage')), true) from pg_namespace where nspname = %s",
        (OWN.schema,),
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


def _refuse_newer(txn: Cursor, plugins: Iterable[Migrations]) -> None:
    known = {each.schema: each for each in available(plugins)}
    for each in _applied(txn).values():
        if each.schema in known and each.version > known[each.schema].version:
            raise SchemaError(
                f"the database has {each} and this release knows up to {known[each.schema]}: install a newer"
                f" {'s2s' if each.schema == OWN.schema else 'release of its plug-in'}"
            )


def _check_encoding(txn: Cursor) -> None:
    txn.execute("show server_encoding")
    encoding = (txn.fetchone() or ("",))[0]
    if encoding != "UTF8":
        raise SchemaError(f"the database has the encoding {encoding}: create one with: createdb --encoding=UTF8 NAME")
