"""One real PostgreSQL for each test process, and a database of its own for every test."""

from __future__ import annotations

import atexit
import itertools
import os
import subprocess
import sys
import tempfile
from functools import cache
from typing import Any

import psycopg2
from psycopg2 import sql
from twisted.trial.unittest import TestCase

from s2s.handlers.discovery import installed
from s2s.store import migrations
from s2s.store.handler_pool import HandlerPool
from s2s.store.pool import Database
from s2s.store.tables.own_keys import digest

_TEMPLATE = "s2s_template"
#: Linux's file system in memory, and the bytes that must be free in it: several test processes share it.
_MEMORY = "/dev/shm"
_ROOM = 4 << 30
_numbers = itertools.count(1)


def memory_directory() -> str | None:
    """Return a directory in memory for a PostgreSQL of the tests; ``None``: there is no room, so use the disk.

    Creating a database takes 20 ms in memory, and 60 to 400 ms on a disk, which creates no more of them in parallel.
    """
    try:
        room = os.statvfs(_MEMORY)
    except OSError:
        return None
    return _MEMORY if room.f_bavail * room.f_frsize >= _ROOM and os.access(_MEMORY, os.W_OK) else None


@cache
def cluster_url() -> str:
    """Start the PostgreSQL of this process if it does not run yet.

    A guardian process owns it (:mod:`s2s.store.embedded.lease`). The guardian ends when its stdin ends, which is when
    this process exits for any reason; then the directory is removed.

    :returns: the URL of its database ``postgres``.
    """
    directory = tempfile.mkdtemp(prefix="s2s-trial-", dir=memory_directory())
    guard = [sys.executable, "-m", "s2s.store.embedded.lease", "--guard", directory]
    process = subprocess.Popen(
        ["/bin/sh", "-c", '"$@"; rm -rf "$0"', directory, *guard],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # communicate() closes stdin and waits for the end.
    atexit.register(process.communicate)
    assert process.stdout is not None
    word, _, url = process.stdout.readline().strip().partition(" ")
    assert word == "ready", "the embedded PostgreSQL did not start; its reason is above"
    with Session(url) as session:
        # The tests never kill this PostgreSQL, so that it needs neither durability nor its WAL.
        for setting, value in (
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("autovacuum", "off"),
            ("max_wal_size", "128MB"),
        ):
            session.run(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(setting), sql.Literal(value)))
        session.run("SELECT pg_reload_conf()")
    return url


def migrate(connection: Any) -> list[str]:
    """Run the migrations of s2s and of the bundled world, and return those that ran."""
    found = installed()
    return migrations.migrate(connection, list(found.migrations.values()), found.settings.values())


@cache
def template() -> str:
    """Make the migrated database from which the tests' databases are copied.

    :returns: its name.
    """
    make_database(_TEMPLATE)
    connection = psycopg2.connect(database_url(_TEMPLATE))
    try:
        migrate(connection)
        # The databases of the tests are copies without a place, so no role reports a copy. The audit stays empty.
        connection.cursor().execute(
            "set local session_replication_role = replica; update s2s.database set made_in = null"
        )
        connection.commit()
    finally:
        connection.close()
    return _TEMPLATE


def database_url(name: str) -> str:
    """Return the URL of another database of the same server."""
    return cluster_url().replace("/postgres?", f"/{name}?", 1)


def make_database(name: str, template: str = "template0") -> None:
    """Create a database as a copy of another one."""
    with Session(cluster_url()) as session:
        # The strategy file_copy would wait for two checkpoints, and the drop for one more.
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY wal_log")
        session.run(create.format(sql.Identifier(name), sql.Identifier(template)))


def drop_database(name: str) -> None:
    """Drop a database, and end its connections."""
    with Session(cluster_url()) as session:
        session.run(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class Session:
    """A blocking connection in autocommit; its search_path also finds the tables of s2s without their schema."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg2.connect(url)
        self._connection.autocommit = True
        self.run("set search_path = public, s2s, s2s_world")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, statement: str | sql.Composable, *params: Any) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, params or None)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        self._connection.close()


class DatabaseTestCase(TestCase):
    """A test with a migrated database of its own, which is dropped after it.

    :ivar url: the database's URL, for psycopg2 and for ``--database``.
    """

    url: str

    def setUp(self) -> None:
        """Copy the template."""
        name = f"test_{next(_numbers)}"
        make_database(name, template())
        self.addCleanup(drop_database, name)
        self.url = database_url(name)
        self._session: Session | None = None

    def pools(self, name: str, threads: int = 3, timeout_s: float = 60.0) -> tuple[Database, HandlerPool]:
        """Start a pool for our statements and a pool for foreign code; both stop at the end of the test.

        :param timeout_s: seconds that a call of foreign code may take.
        """
        database = Database(self.url, name, threads=threads, idle_timeout_s=5.0)
        database.start()
        self.addCleanup(database.stop)
        handlers = HandlerPool(database, f"{name} handlers", threads=threads, timeout_s=timeout_s)
        handlers.start()
        self.addCleanup(handlers.stop)
        return database, handlers

    def execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and commit it. Blocks.

        :param params: values of its ``%s``.
        :returns: its rows; empty for a statement that returns none.
        """
        if self._session is None:
            self._session = Session(self.url)
            self.addCleanup(self._session.close)
        return self._session.run(statement, *params)

    def keep_charged(self) -> None:
        """Make the pause after each failed attempt endless: the real pause is random, and may end at once."""
        self.execute(
            "create function wait() returns trigger language plpgsql set search_path from current as"
            " $$ begin new.due_at := '2100-01-01'; return new; end $$;"
            "create trigger wait before update on s2s.commands for each row when (new.attempts > old.attempts)"
            " execute function wait()"
        )

    def database_id(self) -> str:
        """Return the database's id, which is part of the keys that the database makes."""
        [(database_id,)] = self.execute("select database_id from s2s.database")
        return str(database_id)

    def broadcast_keys(self) -> list[str]:
        """Return the keys of the commands made from the broadcasts, in the order of ``broadcast_id``."""
        rows = self.execute(
            "select broadcast_id, (created_at at time zone 'utc')::text, scope, sector_id, corp_id, player_id, message,"
            " severity, ttl_s from s2s.broadcasts order by broadcast_id"
        )
        return [f"broadcast:{self.database_id()}:{number}:{digest(*content)}" for number, *content in rows]


def rows_read(txn: Any, table: str) -> int:
    """Return how many rows of a table the transaction has read so far, by scans of the table and of its indexes."""
    txn.execute("select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = %s", (table,))
    return int(txn.fetchone()[0])


class RecordingCursor(psycopg2.extensions.cursor):
    """A cursor that records its statements and can count the pages that they read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorded: list[bytes] = []

    def execute(self, query: Any, params: Any = None) -> None:
        """Run a statement and remember it."""
        super().execute(query, params)
        self._recorded.append(self.query)

    def pages(self) -> int:
        """Run each recorded statement once more, and return the number of pages that they read."""
        pages = 0
        for statement in self._recorded:
            super().execute(b"explain (analyze, buffers, format json) " + statement)
            plan = self.fetchall()[0][0][0]["Plan"]
            pages += int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
        return pages
