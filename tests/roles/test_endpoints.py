"""Where a server listens: the parsing of endpoint strings, and a link over every kind of endpoint."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import capturedLogs, formatEvent
from twisted.protocols import portforward
from twisted.trial.unittest import SynchronousTestCase, TestCase

from s2s.roles import certs
from s2s.roles.endpoints import server_endpoint
from s2s.runtime import files
from s2s.runtime.line_quota import PERIOD_S
from s2s.runtime.status_log import LINK_UP
from tests.support.peer import PUSH, Peer, command
from tests.support.roles import PATIENCE_S, Engine, RoleTestCase, Server, free_port, listen
from tests.support.waiting import poll

_HAPROXY = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
listen s2s
    bind 127.0.0.1:{port}
    server s2s 127.0.0.1:{server} send-proxy
"""


def make_certificates(directory: Path, *engines: str, since_days: int = 0) -> None:
    """Create an authority, and certificates of a server and of engines, each valid for a day."""
    now = datetime.now(timezone.utc) - timedelta(days=since_days)
    certs.make(directory, ["localhost", "127.0.0.1"], engines, 1, now)


def listen_tls(directory: Path, port: int, roots: Path | None = None) -> str:
    """Return the endpoint of a server that requires certificates."""
    own = f"privateKey={directory}/server.key:certKey={directory}/server.pem"
    return f"ssl:{port}:interface=127.0.0.1:{own}:trustRoots={roots or directory / 'roots'}"


def connect_tls(directory: Path, host: str, port: int, engine: str | None = "a", roots: Path | None = None) -> str:
    """Return the endpoint of an engine, with a certificate if the engine has a name."""
    own = f":certificate={directory}/engine-{engine}.pem:privateKey={directory}/engine-{engine}.key" if engine else ""
    return f"tls:{host}:{port}{own}:trustRoots={roots or directory / 'roots'}"


class ReadingTests(SynchronousTestCase):
    """Endpoint strings that are parsed or refused."""

    def setUp(self) -> None:
        """Make certificates."""
        self.directory = Path(self.mktemp())
        make_certificates(self.directory, "a")

    def refused(self, description: str, *why: str) -> None:
        """Assert that an endpoint is refused in one line."""
        error = self.assertRaises(ValueError, server_endpoint, MemoryReactorClock(), description)
        self.assertNotIn("\n", str(error))
        for part in why:
            self.assertIn(part, str(error))

    def tls(self, **changed: str) -> str:
        """Return the endpoint string of a server with TLS, with some arguments replaced."""
        arguments = {
            "privateKey": f"{self.directory}/server.key",
            "certKey": f"{self.directory}/server.pem",
            "trustRoots": f"{self.directory}/roots",
        }
        return ":".join(["ssl:4321", *(f"{name}={value}" for name, value in {**arguments, **changed}.items())])

    def test_what_is_twisteds_own(self) -> None:
        """A string without additions of s2s returns Twisted's own endpoint."""
        self.assertIsInstance(server_endpoint(MemoryReactorClock(), "tcp:4321:interface=127.0.0.1"), TCP4ServerEndpoint)
        plain = f"ssl:4321:privateKey={self.directory}/server.key:certKey={self.directory}/server.pem"
        memory = MemoryReactorClock()
        server_endpoint(memory, plain).listen(Factory())
        self.assertEqual([port for port, *_ in memory.tcpServers], [4321])
        self.assertRaises(ValueError, server_endpoint, MemoryReactorClock(), "nonsense:1")
        self.assertRaises(ValueError, server_endpoint, MemoryReactorClock(), "")

    def test_arguments(self) -> None:
        """Port, interface and backlog reach the reactor, by name or in Twisted's order."""
        memory = MemoryReactorClock()
        server_endpoint(memory, self.tls(interface="127.0.0.1", backlog="7")).listen(Factory())
        key, certificate = f"{self.directory}/server.key", f"{self.directory}/server.pem"
        alone = f"ssl:4322:{key}:{certificate}:trustRoots={self.directory}/roots/ca.pem"
        server_endpoint(memory, alone).listen(Factory())
        heard = [(port, backlog, interface) for port, _, backlog, interface in memory.tcpServers]
        self.assertEqual(heard, [(4321, 7, "127.0.0.1"), (4322, 1024, "")])

    def test_the_backlog(self) -> None:
        """The backlog is large enough for many clients, unless the string sets a backlog, by name or by position."""
        named = {
            "tcp:1": 1024,
            "tcp:1:interface=127.0.0.1": 1024,
            "tcp:1:127.0.0.1": 1024,
            "tcp:1:127.0.0.1:7": 7,
            "tcp:backlog=7:port=1": 7,
            "tcp6:1": 1024,
            "tcp6:1:7": 7,
            "haproxy:tcp:1": 1024,
        }
        for described, backlog in named.items():
            memory = MemoryReactorClock()
            server_endpoint(memory, described).listen(Factory())
            self.assertEqual([each for _, _, each, _ in memory.tcpServers], [backlog], described)
        key, certificate = f"{self.directory}/server.key", f"{self.directory}/server.pem"
        for described, backlog in {
            f"ssl:1:{key}:{certificate}": 1024,
            f"ssl:1:{key}:{certificate}:sslmethod=TLSv1_2_METHOD:interface=": 1024,
            f"ssl:1:privateKey={key}:certKey={certificate}:backlog=7": 7,
        }.items():
            memory = MemoryReactorClock()
            server_endpoint(memory, described).listen(Factory())
            self.assertEqual([each for _, _, each, _ in memory.tcpServers], [backlog], described)

    def test_behind_a_proxy(self) -> None:
        """Behind ``haproxy:`` certificates are required and read again, as without it."""
        memory = MemoryReactorClock()
        endpoint = server_endpoint(memory, f"haproxy:{self.tls()}")
        endpoint.listen(Factory())
        [(port, *_)] = memory.tcpServers
        contexts = endpoint._behind
        before = contexts.getContext()
        self.assertEqual((port, contexts.getContext() is before), (4321, True))
        endpoint.reread()
        self.assertIsNot(contexts.getContext(), before)
        self.assertRaises(ValueError, server_endpoint, memory, "haproxy:ssl:4321:trustRoots=/none")

    def test_dates(self) -> None:
        """An expired or not yet valid certificate of a server is logged at the start and when it is read again."""
        with capturedLogs() as captured:
            for since_days, is_valid in ((5, False), (-5, False), (0, True)):
                self.directory = Path(self.mktemp())
                make_certificates(self.directory, since_days=since_days)
                endpoint = server_endpoint(MemoryReactorClock(), self.tls())
                endpoint.reread()
                told = [formatEvent(event) for event in captured]
                self.assertEqual(len(told), 0 if is_valid else 2)
                for line in told:
                    self.assertRegex(
                        line, "CN=s2s server is valid from 20.* to 20.*, and the clock of this machine says 20"
                    )
                    self.assertIn("s2s certs make --renew", line)
                captured.clear()

    def test_without_a_proxy_header(self) -> None:
        """Connections behind ``haproxy:`` without a header cause a line with the cure, then one line a minute."""
        memory = MemoryReactorClock()
        server_endpoint(memory, "haproxy:tcp:4321").listen(Factory.forProtocol(Protocol))
        [(_, factory, _, _)] = memory.tcpServers
        with capturedLogs() as captured:
            for data in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"\0\0\0\x0dno header",
                b"PROXY TCP4 nonsense\r\n",
                b"",
                b"PROXY UNKNOWN\r\n",
            ):
                connection = factory.buildProtocol(None)
                connection.makeConnection(StringTransport(peerAddress=IPv4Address("TCP", "192.0.2.1", 5)))
                connection.dataReceived(data) if data else connection.loseConnection()
            memory.advance(PERIOD_S)
        first, more = map(formatEvent, captured)
        self.assertIn("a connection from 192.0.2.1 without a PROXY header ended: set send-proxy at the proxy", first)
        self.assertIn("2 more connections without", more)

    def test_systemd(self) -> None:
        """A socket that systemd has not passed is reported as such."""
        self.refused("systemd:domain=INET:index=0", "systemd has not passed this socket", ".socket unit")

    def test_quoting(self) -> None:
        """A backslash quotes a colon, an equals sign and a backslash."""
        odd = self.directory.with_name("a:b=c\\d")
        self.directory.rename(odd)
        quoted = str(odd).replace("\\", "\\\\").replace(":", "\\:").replace("=", "\\=")
        self.directory = Path(quoted)
        server_endpoint(MemoryReactorClock(), self.tls())
        self.refused("unix:there\\", "backslash")

    def test_one_file_for_all(self) -> None:
        """Key and certificate may share a file, and roots and chain may be files of many certificates."""
        whole = self.directory / "whole.pem"
        names = ("server.key", "server.pem", "engine-a.pem", "roots/ca.pem")
        whole.write_text("".join((self.directory / name).read_text() for name in names))
        server_endpoint(MemoryReactorClock(), f"ssl:4321:privateKey={whole}:extraCertChain={whole}:trustRoots={whole}")

    def test_files(self) -> None:
        """A file that is missing or has wrong content is named."""
        empty = self.directory / "empty"
        empty.mkdir()
        nothing = self.directory / "nothing.pem"
        nothing.write_text("no certificate")
        broken = self.directory / "broken.pem"
        broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        locked = self.directory / "locked.key"
        locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
        self.refused(self.tls(trustRoots="no-such"), "no-such cannot be read: No such file")
        self.refused(self.tls(trustRoots=str(empty)), "empty has no file whose name ends in .pem")
        self.refused(self.tls(trustRoots=str(self.directory)), "broken.pem has a broken certificate")
        self.refused(self.tls(trustRoots=str(nothing)), "nothing.pem has no certificate")
        self.refused(self.tls(certKey=str(nothing)), "nothing.pem has no certificate")
        self.refused(self.tls(extraCertChain=str(nothing)), "nothing.pem has no certificate")
        self.refused(self.tls(privateKey="no-such"), "no-such cannot be read: No such file")
        self.patch(files, "SILENT_S", 0.1)
        pipe = self.directory / "pipe"
        os.mkfifo(pipe)
        self.refused(self.tls(trustRoots=str(pipe)), "pipe cannot be read: nothing came through it")
        self.refused(self.tls(privateKey=str(locked)), "locked.key has a passphrase")
        for wrong in (nothing, self.directory / "engine-a.key"):
            self.refused(self.tls(privateKey=str(wrong)), f"{wrong} has no key of", "server.pem")

    def test_wrong_arguments(self) -> None:
        """A misspelt, repeated, out-of-range or missing argument is named."""
        self.refused(self.tls(trustroots="x"), "no argument 'trustroots'", "trustRoots")
        self.refused(self.tls(dhParameters="x"), "dhParameters only without trustRoots")
        self.refused(self.tls(sslmethod="x"), "sslmethod only without trustRoots")
        self.refused(self.tls(backlog="many"), "backlog 'many' is no number")
        self.refused(self.tls(port="1"), "twice")
        self.refused(self.tls().replace("4321", "65536"), "port '65536' is no number between 0 and 65535")
        self.refused("ssl:trustRoots=x", "ssl: has no port")
        self.refused(self.tls(trustRoots=""), "ssl: has no trustRoots")
        self.refused("unix:", "unix: has no address")
        self.refused("unix:x:mode=999", "mode '999' is no number between 0 and 777")
        self.refused("unix:x:lockfile=yes", "lockfile 'yes'")


class LockTests(TestCase):
    """The lock of a UNIX socket."""

    def setUp(self) -> None:
        """Choose a path, which must be short."""
        self.directory = Path(tempfile.mkdtemp(prefix="s2s-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = self.directory / "link"

    @inlineCallbacks
    def listening(self, more: str = "") -> Iterator[Deferred[Any]]:
        """Listen until the test ends."""
        port = yield server_endpoint(reactor, f"unix:{self.path}{more}").listen(Factory())
        self.addCleanup(port.stopListening)
        return port

    @inlineCallbacks
    def test_one_at_a_time(self):
        """While one server listens, with the mode that it was given, another is refused and does not disturb it."""
        yield self.listening(":mode=600")
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        error = yield self.assertFailure(self.listening(), ValueError)
        self.assertIn("another server", str(error))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.path))

    @inlineCallbacks
    def test_left_behind(self):
        """A socket on which no process listens any more is replaced."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(self.path))
        yield self.listening()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.path))

    @inlineCallbacks
    def test_not_a_socket(self):
        """A file that is no socket is not removed."""
        self.path.write_text("precious")
        yield self.assertFailure(self.listening(), Exception)
        self.assertEqual(self.path.read_text(), "precious")

    @inlineCallbacks
    def test_without_lock(self):
        """With ``lockfile=0`` the endpoint is Twisted's own, and creates no file beside the socket."""
        yield self.listening(":lockfile=0")
        self.assertEqual(os.listdir(self.directory), ["link"])


class LinkTests(RoleTestCase):
    """A link of the two real roles over each kind of endpoint."""

    @inlineCallbacks
    def links(self, server: Server, engine: Engine) -> Iterator[Deferred[Any]]:
        """Assert that a link comes up, that a broadcast becomes a notice over it, and that the engine can close it."""
        if not server.is_running:
            yield server.start()
        yield engine.start()
        yield server.says(f"{LINK_UP} engine-1")
        self.execute("insert into s2s.broadcasts (message) values ('to all')")
        yield poll(lambda: self.count("notices") == 1, "the notice is there", timeout=PATIENCE_S)
        # TLS does not close a connection that has a producer by itself.
        engine.stop()
        self.assertEqual(engine.lines("did not finish in time"), [])

    @inlineCallbacks
    def test_tcp(self):
        """``tcp:``, by a host name."""
        server = self.server()
        yield self.links(server, self.engine(f"tcp:localhost:{server.port}"))

    @inlineCallbacks
    def test_unix(self):
        """``unix:``, also after the server was killed and has left its socket behind."""
        path = self.directory / "link"
        server, engine = self.server(endpoint=f"unix:{path}"), self.engine(f"unix:{path}")
        yield server.start()
        server.kill()
        self.assertTrue(path.is_socket())
        server.turn_page()
        yield server.start()
        yield self.links(server, engine)

    @inlineCallbacks
    def test_tls(self):
        """``ssl:`` and ``tls:`` with certificates of one authority on both sides, by a name and by an address."""
        make_certificates(self.directory / "tls", "a")
        port = free_port()
        server = self.server(endpoint=listen_tls(self.directory / "tls", port))
        yield self.links(server, self.engine(connect_tls(self.directory / "tls", "localhost", port)))
        yield self.engine(connect_tls(self.directory / "tls", "127.0.0.1", port), name="engine-2").start()
        yield server.says(f"{LINK_UP} engine-2")

    @inlineCallbacks
    def test_haproxy(self):
        """``haproxy:tcp:`` behind HAProxy if it is installed, else behind a forwarder that sends the same header."""
        server = self.server(endpoint="haproxy:" + listen(front := free_port()))
        port = yield self.proxy(front)
        yield self.links(server, self.engine(port))

    @inlineCallbacks
    def proxy(self, server: int) -> Iterator[Deferred[Any]]:
        """Start a proxy before a server, and return its port."""
        haproxy = shutil.which("haproxy")
        if haproxy is None:
            forwarder = portforward.ProxyFactory("127.0.0.1", server)
            forwarder.protocol = _Forwarder
            forwarder.noisy = False
            port = reactor.listenTCP(0, forwarder, interface="127.0.0.1")
            self.addCleanup(port.stopListening)
            return port.getHost().port
        port = free_port()
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(_HAPROXY.format(port=port, server=server))
        process = subprocess.Popen([haproxy, "-db", "-f", configuration], stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        yield poll(lambda: _is_open(port), "HAProxy listens")
        return port

    @inlineCallbacks
    def test_proxy_header(self):
        """The log names a peer by the address in its PROXY header, and a peer without one gets no link."""
        server = self.server(endpoint="haproxy:" + listen(port := free_port()))
        yield server.start()
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as link:
            peer = Peer(link, name="far away")
            peer.write(b"PROXY TCP4 192.0.2.7 127.0.0.1 54321 4321\r\n")
            peer.greet()
            self.assertTrue(peer.call(PUSH, command("from behind a proxy"))["accepted"])
            yield server.says(f"{LINK_UP} far away at 192.0.2.7:54321")
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as link:
            peer = Peer(link)
            peer.send(PUSH, command("without a header"))
            peer.rest()
        self.assertEqual(self.execute("select idem_key from s2s.commands"), [("from behind a proxy",)])
        yield server.says("a connection from 127.0.0.1 without a PROXY header ended: set send-proxy")


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class _Header(portforward.ProxyClient):
    """The connection to the server, which begins with the PROXY header."""

    def connectionMade(self) -> None:
        near, here = self.peer.transport.getPeer(), self.peer.transport.getHost()
        self.transport.write(f"PROXY TCP4 {near.host} {here.host} {near.port} {here.port}\r\n".encode())
        super().connectionMade()


class _HeaderFactory(portforward.ProxyClientFactory):
    protocol = _Header
    noisy = False


class _Forwarder(portforward.ProxyServer):
    clientProtocolFactory = _HeaderFactory


class TlsRefusalTests(RoleTestCase):
    """A peer with a wrong certificate, or none, gets no link, and one line on either side has the reason."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Start a server that requires certificates of one authority, and create another authority."""
        super().setUp()
        self.ours, self.other = self.directory / "ours", self.directory / "other"
        for directory in (self.ours, self.other):
            make_certificates(directory, "a")
        self.port = free_port()
        self.wanting = self.server(endpoint=listen_tls(self.ours, self.port))
        yield self.wanting.start()

    @inlineCallbacks
    def refused(self, endpoint: str, server_says: str, engine_says: str) -> Iterator[Deferred[Any]]:
        """Assert that there is no link with an engine, and which lines both sides log."""
        engine = self.engine(endpoint)
        yield engine.start()
        yield engine.says(engine_says)
        yield self.wanting.says(server_says)
        self.assertIn("no link: TLS failed: ", engine.lines(engine_says)[0])
        self.assertIn("closed: TLS failed: ", self.wanting.lines(server_says)[0])
        for role in (engine, self.wanting):
            self.assertEqual(role.lines("engine up") + role.lines("link up"), [])

    def test_no_certificate(self):
        """An engine without a certificate."""
        return self.refused(
            connect_tls(self.ours, "localhost", self.port, None),
            "peer did not return a certificate",
            "certificate required",
        )

    @inlineCallbacks
    def test_one_end_without_tls(self):
        """If only one side uses TLS, both lines name the cure."""
        engine = self.engine(f"tcp:127.0.0.1:{self.port}")
        yield engine.start()
        yield self.wanting.says("wrong version number')]: where the server listens with TLS, the engine needs")
        yield engine.says("before a frame came: where the server listens with TLS, the engine needs --connect tls:HOST")
        plain = free_port()
        server = self.server(endpoint=listen(plain))
        yield server.start()
        engine = self.engine(connect_tls(self.ours, "localhost", plain, "a"))
        yield engine.start()
        yield engine.says("wrong version number')]: the server listens without TLS")
        yield server.says("speaks TLS: the server listens without TLS, and the engine connects with it")

    def test_other_authority(self):
        """An engine with a certificate of another authority."""
        return self.refused(
            connect_tls(self.other, "localhost", self.port, roots=self.ours / "roots"),
            "certificate verify failed",
            "unknown ca",
        )

    @inlineCallbacks
    def test_ended(self):
        """For expired certificates both the refusing side and the owner log the dates."""
        old = self.directory / "old"
        shutil.copytree(self.ours, old)
        certs.make(old, ["localhost"], ["a"], 1, datetime.now(timezone.utc) - timedelta(days=5), renew=True)
        yield self.refused(connect_tls(old, "localhost", self.port), "CN=engine a is valid from", "certificate expired")
        server = self.server(endpoint=listen_tls(old, port := free_port()))
        yield server.start()
        engine = self.engine(connect_tls(self.ours, "localhost", port), name="engine-2")
        yield engine.start()
        yield engine.says("verify failed')]: the certificate CN=s2s server is valid from 20")
        self.assertIn("and the clock of this machine says 20", engine.lines("CN=s2s server")[0])
        for own in (self.engine(connect_tls(old, "localhost", self.port), name="engine-3"), server):
            if not own.is_running:
                yield own.start()
            yield own.says("renew the certificate with s2s certs make --renew")

    def test_untrusted_server(self):
        """An engine that does not trust the server's authority."""
        return self.refused(
            connect_tls(self.ours, "localhost", self.port, roots=self.other / "roots"),
            "unknown ca",
            "certificate verify failed",
        )
