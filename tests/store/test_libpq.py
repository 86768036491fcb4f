"""libpq's variables hold as they were at the start: :mod:`s2s.store.libpq`."""

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

#: The variable of each parameter, by libpq itself.
_VARIABLES = {each.keyword.decode(): each.envvar.decode() for each in pq.Conninfo.get_defaults() if each.envvar}
#: Parameters that every connection of ours has in any case, and one that cannot be overridden.
_OTHERS = {"connect_timeout", "client_encoding", "application_name", "service"}


class _ToSocket(ProxyServer):
    """A TCP connection that leads to the UNIX socket whose path is the factory's host."""

    reactor = SimpleNamespace(connectTCP=lambda host, _, client: reactor.connectUNIX(host, client))  # type: ignore[attr-defined]


class EnvironmentTests(SynchronousTestCase):
    """:class:`s2s.store.libpq.Environment`."""

    def test_every_variable(self) -> None:
        """Each variable that libpq has is the one of its parameter, and is known here."""
        for name, variable in _VARIABLES.items():
            if name not in _OTHERS and name in libpq._KNOWN:
                self.assertEqual(Environment({variable: "x"}).parameters({})[name], "x")
        self.assertEqual(_VARIABLES.keys() - _OTHERS, libpq._DEFAULTS.keys())

    def test_the_url_comes_first(self) -> None:
        """A parameter of the URL goes before its variable."""
        self.assertEqual(parameters("dbname=game sslmode=require")["sslmode"], "require")

    def test_defaults_that_depend(self) -> None:
        """The system's own authorities are used with full verification, unless something else is said."""
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
        """A service that is named at the start or in the URL decides everything."""
        self.assertEqual(Environment({"PGSERVICE": "x", "PGHOST": "h"}).parameters({}), {})
        self.assertEqual(Environment({"PGHOST": "h"}).parameters({"service": "x"}), {})

    def test_libpq_18(self) -> None:
        """A newer libpq than the installed one of psycopg2 accepts every default."""
        given = " ".join(f"{name}='{value}'" for name, value in {**libpq._DEFAULTS, "host": "/nowhere"}.items())
        self.assertIn(b"No such file", pq.PGconn.connect(given.encode()).error_message)


class ConnectingTests(DatabaseTestCase):
    """Connections with all parameters passed."""

    def compare(self, url: str) -> None:
        """See that ours is the connection that libpq makes of a URL by itself, apart from what we mean to change."""
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
        """Return the parameters that are said of a connection and are not empty."""
        return {name: value for name, value in conn.info.dsn_parameters.items() if value and name not in but}

    def test_by_socket(self) -> None:
        """Without a variable, our parameters are the same as libpq's own over a UNIX socket."""
        self.compare(self.url)

    async def test_by_tcp(self) -> None:
        """Without a variable, our parameters are the same as libpq's own over TCP."""
        place = parse_dsn(self.url)
        factory = ProxyFactory(f"{place['host']}/.s.PGSQL.{place.get('port', 5432)}", 0)
        factory.protocol = _ToSocket
        port = reactor.listenTCP(0, factory, interface="127.0.0.1")  # type: ignore[attr-defined]
        self.addCleanup(port.stopListening)
        address = f"postgresql://{place['user']}@127.0.0.1:{port.getHost().port}/{place['dbname']}"
        await deferToThread(self.compare, address)

    def test_a_home_that_is_not_utf8(self) -> None:
        """A home directory whose name is not UTF-8 keeps nobody from connecting, and its password file is read."""
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
        # libpq's own complaint about a file that others may read.
        self.assertIn(str(home / ".pgpass"), done.stderr)

    def test_a_change_later(self) -> None:
        """A variable that a plug-in sets after the start, whichever it is, reaches no connection of ours."""
        for name, variable in _VARIABLES.items():
            if name != "service":
                with self.subTest(variable=variable), mock.patch.dict(os.environ, {variable: "nonsense"}):
                    connect(parameters(self.url)).close()


class PasswordTests(DatabaseTestCase):
    """A database that asks for a password, by each of its methods."""

    def setUp(self) -> None:
        """Make a user for each method, and have the database ask for its password."""
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
        """Return the URL of the test's database for a user."""
        return self.url.replace("postgres@", f"{user}{password}@", 1)

    async def test_each_kind_of_connection(self) -> None:
        """A password in the URL opens each kind of connection."""
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
        """A password file is read, by its variable and by the parameter; a wrong password is told as one."""
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
