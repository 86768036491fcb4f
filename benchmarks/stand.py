"""The test stand: it runs each cell with its own database, server process and client process."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import procrastinate
import psycopg2
from psycopg2 import sql

from benchmarks.contestants import _link
from benchmarks.load import Load, Place, Result
from benchmarks.plan import OURS, THEIRS, Cell, Contestant
from s2s.handlers.discovery import installed
from s2s.store import migrations
from s2s.store.embedded import postmaster

#: Seconds within which a started server must accept connections.
_START_S = 30.0


class Stand:
    """The benchmark's own PostgreSQL, with its default durability, and the contestants that run on it.

    :param settings: settings of PostgreSQL that differ from its defaults.
    """

    def __init__(self, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="s2s-bench-")).resolve()
        self._directory.chmod(0o755)
        data = self._directory / "postgres"
        self.url, self._process = postmaster.start(data)
        for name, value in settings.items():
            self.execute(sql.SQL("alter system set {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        if settings:
            postmaster.stop(data)
            self.url, self._process = postmaster.start(data)
        self._databases = 0
        #: The contestant's server that was started last.
        self.server: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of PostgreSQL."""
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """Stop the database, and remove it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()
        shutil.rmtree(self._directory)

    def execute(self, statement: Any, params: Any = None, url: str = "") -> list[Any]:
        """Run a statement on a connection of its own."""
        with closing(psycopg2.connect(url or self.url)) as connection, connection.cursor() as txn:
            connection.autocommit = True
            txn.execute(statement, params)
            return txn.fetchall() if txn.description else []

    def make_database(self, schemas: tuple[str, ...]) -> str:
        """Make a database with the tables of these schemas, and return its URL."""
        self._databases += 1
        name = f"bench_{self._databases}"
        self.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        url = self.url.replace("/postgres?", f"/{name}?", 1)
        if OURS in schemas:
            with closing(psycopg2.connect(url)) as connection:
                found = installed()
                migrations.migrate(connection, list(found.migrations.values()), found.settings.values())
            secret = base64.b64encode(_link.SECRET).decode()
            self.execute(
                "insert into s2s.s2s_keys (key_id, key_b64, role, is_default_tx, active_from)"
                " values (%s, %s, 'any', true, to_timestamp(0))",
                (_link.KEY_ID, secret),
                url=url,
            )
        if THEIRS in schemas:
            asyncio.run(_procrastinate(url))
        return url

    def drop_database(self, url: str) -> None:
        """Remove a database, and write its dirty pages now, so that this does not disturb the next measurement."""
        name = url.partition("?")[0].rpartition("/")[2]
        self.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
        self.execute("checkpoint")

    def measure(self, cell: Cell, warm_up_s: float, seconds: float, items: int | None = None) -> Result:
        """Measure one cell on a database of its own.

        :param items: replaces ``items`` of the load if all items exist from the beginning.
        """
        contestant = cell.contestant
        url = self.make_database(contestant.schemas) if contestant.schemas else ""
        # A longer measurement of latency, so that the 99.9th percentile rests on many requests.
        long = 10 if cell.load.rate else 1
        load = replace(cell.load, warm_up_s=warm_up_s, seconds=seconds * long)
        if cell.is_drained and items is not None:
            load = replace(load, items=items)
        try:
            with self.serving(contestant, url) as place:
                return self.drive(contestant, load, place)
        finally:
            if url:
                self.drop_database(url)

    def drive(self, contestant: Contestant, load: Load, place: Place) -> Result:
        """Run the contestant's client against its running server, if it has one, and return the result."""
        told = subprocess.run(
            [*side(contestant, "drive", place), json.dumps(asdict(load))],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return Result(**json.loads(told.stdout.splitlines()[-1]))

    @contextmanager
    def serving(self, contestant: Contestant, url: str) -> Iterator[Place]:
        """Run a contestant's server, if it has one."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = Place(probe.getsockname()[1], url)
        if not contestant.serves:
            yield place
            return
        with subprocess.Popen(side(contestant, "serve", place), stdin=subprocess.PIPE) as server:
            self.server = server
            _await(place.port, server)
            try:
                yield place
            finally:
                server.communicate()


def side(contestant: Contestant, which: str, place: Place) -> list[str]:
    """Return the command line of one side of a contestant; the side ``drive`` needs its load as a last argument."""
    return [sys.executable, "-m", "benchmarks.contestants", contestant.module, which, json.dumps(asdict(place))]


def _await(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError("the contestant's server does not accept connections")


async def _procrastinate(url: str) -> None:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
