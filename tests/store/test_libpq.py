"""Connections use libpq's environment variables as they were at the start: :mod:`s2s.store.libpq`."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psycopg2
from psycopg import pq
from psycopg2.extensions import parse_dsn
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.protocols.portforward import ProxyFactory, ProxyServer
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.store import libpq
from s2s.store.connection import connect
from s2s.store.driver import Query, parameters
from s2s.store.libpq import Environment
from s2s.store.listen import Listener
from s2s.store.pool import Database, blocking
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

#: The environment variable of each connection parameter, according to libpq.
_VARIABLES = {each.keyword.decode(): each.envvar.decode() for each in pq.Conninfo.get_defaults() if each.envvar}
#: Parameters that each connection of ours sets anyway, and one that cannot be overridden.
_OTHERS = {"connect_timeout", "client_encoding", "application_name", "service"}


class _ToSocket(ProxyServer):
    """A TCP connection that is forwarded to a UNIX socket; the factory's host is the socket's path."""

    reactor = SimpleNamespace(connectTCP=lambda host, _, client: reactor.connectUNIX(host, client))  # type: ignore[attr-defined]


class EnvironmentTests(SynchronousTestCase):
    """:class:`s2s.store.libpq.Environment`."""

    def test_every_variable(self) -> None:
        """Each environment variable of libpq sets its parameter, and our list of parameters is complete."""
        for name, variable in _VARIABLES.items():
            if name not in _OTHERS and name in libpq._KNOWN:
                self.assertEqual(Environment({variable: "x"}).parameters({})[name], "x")
        self.assertEqual(_VARIABLES.keys() - _OTHERS, libpq._DEFAULTS.keys())

    def test_the_url_comes_first(self) -> None:
        """A parameter in the URL overrides its environment variable."""
        self.assertEqual(parameters("dbname=game sslmode=require")["sslmode"], "require")

    def test_defaults_that_depend(self) -> None:
        """sslrootcert=system implies sslmode=verify-full, unless another mode is set."""
        for variables, given, expected in (
            ({}, {}, "prefer"),
            ({}, {"sslrootcert": "system"}, "verify-full"),
            ({"PGSSLROOTCERT": "system"}, {}, "verify-full"),
            ({"PGSSLROOTCERT": "system"}, {"sslrootcert": "/ca.pem"}, "prefer"),
            ({"PGSSLMODE": "allow"}, {"sslrootcert": "system"}, "allow"),
            ({"PGREQUIRESSL": "1"}, {}, "require"),
            ({"PGREQUIRESSL": "1", "PGSSLMODE": "disable"}, {}, "disable"),
        ):
            with self.subTest(variables=variables, given=given):
                self.assertEqual(Environment(variables).parameters(given)["sslmode"], expected)

    def test_a_service(self) -> None:
        """If a service is named at the start or in the URL, the environment adds no other parameter."""
        self.assertEqual(Environment({"PGSERVICE": "x", "PGHOST": "h"}).parameters({}), {})
        self.assertEqual(Environment({"PGHOST": "h"}).parameters({"service": "x"}), {})

    def test_libpq_18(self) -> None:
        """A libpq newer than the one of psycopg2 accepts each of our defaults."""
        given = " ".join(f"{name}='{value}'" for name, value in {**libpq._DEFAULTS, "host": "/nowhere"}.items())
        self.assertIn(b"No such file", pq.PGconn.connect(given.encode()).error_message)


class ConnectingTests(DatabaseTestCase):
    """Connections to which all parameters are passed explicitly."""

    def compare(self, url: str) -> None:
        """Assert that our connection has the parameters that libpq sets for a URL, except those that we change."""
        rest = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        with mock.patch.dict(os.environ, rest, clear=True), mock.patch.object(libpq, "AT_START", Environment({})):
            given = parameters(url)
            plain, ours = psycopg2.connect(url), connect(given)
        self.addCleanup(plain.close)
        self.addCleanup(ours.close)
        wanted = {name for name in given if name not in libpq._DEFAULTS} | {"require_auth"}
        by_itself, passed = (self.said(conn, wanted) for conn in (plain, ours))
        self.assertEqual(passed, by_itself)

    def said(self, conn: Any, but: set[str]) -> dict[str, str]:
        """Return the non-empty parameters of a connection, without the excluded ones."""
        return {name: value for name, value in conn.info.dsn_parameters.items() if value and name not in but}

    def test_by_socket(self) -> None:
        """Without environment variables, our parameters equal libpq's own over a UNIX socket."""
        self.compare(self.url)

    async def test_by_tcp(self) -> None:
        """Without environment variables, our parameters equal libpq's own over TCP."""
        place = parse_dsn(self.url)
        factory = ProxyFactory(f"{place['host']}/.s.PGSQL.{place.get('port', 5432)}", 0)
        factory.protocol = _ToSocket
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")  # type: ignore[attr-defined]
        self.addCleanup(port.stopListening)
        address = f"postgresql://{place['user']}@127.0.0.1:{port.getHost().port}/{place['dbname']}"
        await deferToThread(self.compare, address)

    def test_a_home_that_is_not_utf8(self) -> None:
        """A home directory with a name that is not UTF-8 does not prevent a connect, and its password file is read."""
        home = Path(self.mktemp()).resolve() / "caf\udce9"
        home.mkdir(parents=True)
        (home / ".pgpass").write_text("")
        (home / ".pgpass").chmod(0o644)
        look = "import sys; from s2s.store.pool import blocking\nwith blocking(sys.argv[1]): print('connected')"
        done = subprocess.run(
            [sys.executable, "-c", look, self.url],
            env={**os.environ, "HOME": str(home)},
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
        self.assertEqual(done.stdout, "connected\n", done.stderr)
        # libpq's own warning about a password file that other users may read.
        self.assertIn(str(home / ".pgpass"), done.stderr)

    def test_a_change_later(self) -> None:
        """A variable of libpq that a plug-in sets after the start affects no connection of ours."""
        for name, variable in _VARIABLES.items():
            if name != "service":
                with self.subTest(variable=variable), mock.patch.dict(os.environ, {variable: "nonsense"}):
                    connect(parameters(self.url)).close()


class PasswordTests(DatabaseTestCase):
    """A database that requires a password, with each of its methods."""

    def setUp(self) -> None:
        """Make a user for each method, and make the database require the user's password."""
        super().setUp()
        [(path,)] = self.execute("show hba_file")
        before = Path(path).read_text()
        self.addCleanup(self.execute, "select pg_reload_conf()")
        self.addCleanup(Path(path).write_text, before)
        lines = []
        for method in ("scram-sha-256", "md5", "password"):
            user = f"s2s_{method[:3]}"
            self.execute(f"set password_encryption = '{'md5' if method == 'md5' else 'scram-sha-256'}'")
            self.execute(f"create role {user} superuser login password 'open sesame'")
            self.addCleanup(self.execute, f"drop role {user}")
            lines.append(f"local all {user} {method}\n")
        Path(path).write_text("".join(lines) + before)
        self.execute("select pg_reload_conf()")

    def url_of(self, user: str, password: str = "") -> str:
        """Return the URL of the test's database for this user."""
        return self.url.replace("postgres@", f"{user}{password}@", 1)

    async def test_each_kind_of_connection(self) -> None:
        """Each kind of connection authenticates with a password in the URL."""
        for user in ("s2s_scr", "s2s_md5", "s2s_pas"):
            url = self.url_of(user, ":open%20sesame")
            with blocking(url) as txn:
                txn.execute("select current_user")
                self.assertEqual(txn.fetchall(), [(user,)])
            database = Database(url, threads=1)
            database.start()
            self.addCleanup(database.stop)
            self.assertIsNone(await database.run(lambda txn: txn.execute("select 1")))
            asked: Deferred[Any] = Deferred()
            database.query(Query("select current_user::text", ()), asked.callback)
            self.assertEqual(await asked, [(user,)])
            listener = Listener(url, {})
            listener.start()
            self.addCleanup(listener.stop)
            await poll(partial(getattr, listener, "is_connected"), "the listener")

    def test_a_password_file(self) -> None:
        """A password file is read from its variable or its parameter; a wrong password raises an error that says so."""
        path = Path(self.mktemp())
        path.write_text("*:*:*:s2s_scr:open sesame\n")
        path.chmod(0o600)
        with blocking(f"{self.url_of('s2s_scr')}&passfile={path}") as txn:
            txn.execute("select 1")
        self.patch(libpq, "AT_START", Environment({"PGPASSFILE": str(path)}))
        with blocking(self.url_of("s2s_scr")) as txn:
            txn.execute("select 1")
        with (
            self.assertRaisesRegex(DatabaseUnavailable, "password authentication failed"),
            blocking(self.url_of("s2s_scr", ":x")),
        ):
            pass
