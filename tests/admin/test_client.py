"""The admin client: in memory against the real resource, and over sockets against other servers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

from treq.testing import StubTreq
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks, succeed
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock as FakeTime
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from s2s.admin import transport
from s2s.admin.client import AdminClient
from s2s.admin.http.service import Web
from s2s.admin.operations import all_operations, config
from s2s.errors import BadReply, CallError, OperatorError, Refused, UnknownOutcome, Unreachable
from s2s.handlers.discovery import Found
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store import pool
from s2s.store.access import make
from s2s.store.tables import tokens
from s2s.store.tables.commands_admin import CommandRow
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import free_port

TOKEN = make("x")


class _Inline:
    """A pool that runs work synchronously, on one connection to the test's database."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        """Run the work and return its result."""
        return succeed(pool.step(self._txn, lambda txn: work(txn, *args)))


class InMemoryTests(DatabaseTestCase):
    """The real API on the real tables, without a socket."""

    def setUp(self) -> None:
        """Create the API and a client of it."""
        super().setUp()
        blocking = pool.blocking(self.url)
        txn = blocking.__enter__()
        self.addCleanup(blocking.__exit__, None, None, None)
        token = pool.step(txn, lambda txn: tokens.add(txn, "alice", "admin"))
        database: Any = _Inline(txn)

        async def ready() -> dict[str, str]:
            return {"database": "ok", "pushes": "ok", "executor": "ok"}

        self.time = FakeTime()
        web = Web(database, Clock(self.time), Counters(), ready, plugins=FOUND)
        web.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(web.stop()))
        self.stub = StubTreq(web.site.resource)
        self.client = AdminClient("http://localhost", token, http=self.stub)

    def call(self, calling: Deferred[Any]) -> Any:
        """Return the result of a call."""
        self.pass_time()
        return self.successResultOf(calling)

    def pass_time(self) -> None:
        """Deliver the request, advance the clock by one second, and deliver the response."""
        self.stub.flush()
        self.time.advance(1)
        self.stub.flush()

    def refused(self, calling: Deferred[Any]) -> Refused:
        """Return the error with which the server refuses a call."""
        self.pass_time()
        return self.failureResultOf(calling, Refused).value

    def test_typed(self) -> None:
        """Rows are decoded to the classes of the tables, and times to datetime objects."""
        self.execute(
            "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload) values (5, 'a.b', 'k', '{\"n\": 1}')"
        )
        page = self.call(self.client.list_commands(status="ready"))
        [row] = page.items
        self.assertIsInstance(row, CommandRow)
        self.assertEqual((row.cmd_id, row.payload, row.error), (5, {"n": 1}, None))
        self.assertLess(abs((datetime.now(timezone.utc) - row.created_at).total_seconds()), 60)
        self.assertIsNone(page.next_cursor)

    def test_pages(self) -> None:
        """``walk`` returns each row of a list once, page by page, and sends the filter with every page."""
        self.execute(
            "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload)"
            " select n, case when n % 2 = 0 then 'a.b' else 'c.d' end, n::text, '{}' from generate_series(1, 25) n"
        )

        async def walk() -> list[int]:
            from s2s.admin.operations import commands

            return [row.cmd_id async for row in self.client.walk(commands.LIST, cmd_type="a.b", limit=5)]

        walking = Deferred.fromCoroutine(walk())
        for _ in range(4):
            self.stub.flush()
        self.assertEqual(self.successResultOf(walking), list(range(24, 0, -2)))
        keys = self.call(self.client.list_config(limit=2))
        more = self.call(self.client.list_config(limit=2, cursor=keys.next_cursor))
        self.assertLess(keys.items[-1].key, more.items[0].key)

    def test_refused(self) -> None:
        """A refusal carries the server's code, message and details."""
        error = self.refused(self.client.set_config("relay.window", 0))
        self.assertEqual((error.code, error.message), ("bad_payload", "relay.window must be from 1 to 1024"))
        self.assertEqual((error.details["path"], error.details["status"], error.retryable), ("/body/value", 422, False))
        self.assertEqual(self.refused(self.client.show_command(9)).code, "not_found")
        self.call(self.client.give_order("admin.engine.force_tick.v1", {"job_type": "decay"}, idem_key="k"))
        conflict = self.refused(self.client.give_order("admin.engine.force_tick.v1", {"job_type": "x"}, idem_key="k"))
        [(order_id,)] = self.execute("select order_id from s2s.orders")
        self.assertEqual((conflict.code, conflict.details["order_id"]), ("idem_conflict", order_id))
        stranger = AdminClient("http://localhost", TOKEN, http=self.stub)
        self.assertEqual(self.refused(stranger.list_keys()).code, "auth_bad")

    def test_names(self) -> None:
        """A name in a path is escaped, so that every character reaches the server."""
        for name in ("a/b", "a b", "\u00e9", "a?b#c", "%2F", "..a", "'; drop table engines; --"):
            self.execute("insert into s2s.engines (name, wanted) values (%s, 'paused')", name)
            shown = self.call(self.client.show_engine(name))
            self.assertEqual((shown.name, shown.state), (name, "no link"))
            self.assertEqual(self.refused(self.client.pause_engine(name, reason="x")).code, "not_ready")

    def test_every_operation(self) -> None:
        """Every operation except those of plug-ins has a client method, whose parameters are its members."""
        for operation in all_operations(Found()):
            members = {*operation.path_params, *operation.query, *operation.body_schema.document.get("properties", {})}
            taken = {
                name.removesuffix("_s") for name in inspect.signature(getattr(AdminClient, operation.name)).parameters
            }
            with self.subTest(operation=operation.name):
                self.assertEqual(taken - {"self"}, {name.removesuffix("_s") for name in members})


class _Canned(Resource):
    """A resource that returns the same response to every request."""

    isLeaf = True

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        super().__init__()
        self._answer = (status, body, headers)
        self.seen: list[Any] = []

    def render(self, request: Any) -> bytes:
        """Return the response."""
        status, body, headers = self._answer
        self.seen.append(request.uri)
        request.setResponseCode(status)
        for name, value in headers.items():
            request.setHeader(name, value)
        return body


class _Mute(Protocol):
    """A server that closes the connection at the first bytes, or never responds."""

    closes = True

    def dataReceived(self, data: bytes) -> None:
        """Close the connection, if set to do so."""
        if self.closes:
            self.transport.loseConnection()


class _Endless(Protocol):
    """A server that starts a response and never finishes it."""

    def dataReceived(self, data: bytes) -> None:
        """Send a part of a response."""
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b" " * 1001)


class NetworkTests(DatabaseTestCase):
    """The client against servers that are not servers of s2s."""

    @inlineCallbacks
    def listening(self, factory: Any, scheme: str = "http") -> Iterator[Deferred[Any]]:
        """Listen with a factory, and return a client of that port."""
        port = yield TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(factory)
        self.addCleanup(port.stopListening)
        client = AdminClient(f"{scheme}://127.0.0.1:{port.getHost().port}", TOKEN)
        self.addCleanup(client.close)
        return client

    @inlineCallbacks
    def fails(self, factory: Any, kind: type[CallError], told: str) -> Iterator[Deferred[Any]]:
        """Assert that a call fails with an error of a kind and text, and that the token is not shown."""
        client = yield self.listening(factory)
        error = yield self.assertFailure(client.list_keys(), kind)
        self.assertRegex(str(error), told)
        self.assertNotIn(TOKEN, str(error) + repr(client))

    @inlineCallbacks
    def test_nobody(self) -> Iterator[Deferred[Any]]:
        """A refused connection or an unknown host raises ``Unreachable``: no request was sent."""
        client = AdminClient(f"http://127.0.0.1:{free_port()}", TOKEN)
        error = yield self.assertFailure(client.list_keys(), Unreachable)
        self.assertRegex(str(error), r"^http://127.0.0.1:\d+ does not answer: .*refused")
        error = yield self.assertFailure(AdminClient("http://no.such.host.invalid", TOKEN).list_keys(), Unreachable)
        self.assertIn("does not answer", str(error))

    @inlineCallbacks
    def test_lost(self) -> Iterator[Deferred[Any]]:
        """If the response is lost or late, the outcome is unknown."""
        port = r" \(is this the port of the server's --http\?\): "
        yield self.fails(Factory.forProtocol(_Mute), UnknownOutcome, f"^the answer of .* was lost: .*{port}ask again$")
        client = yield self.listening(Factory.forProtocol(_Mute))
        error = yield self.assertFailure(client.set_config("x", 1), UnknownOutcome)
        self.assertRegex(str(error), f"{port}look whether it was done before you ask again$")
        client = yield self.listening(Factory.forProtocol(_Mute), "https")
        error = yield self.assertFailure(client.set_config("x", 1), CallError)
        self.assertIn("TLS", str(error))
        self.patch(_Mute, "closes", False)
        self.patch(transport, "ANSWER_S", 0.2)
        late = "^the answer of .* was lost: it did not come within 0.2 s: ask again$"
        yield self.fails(Factory.forProtocol(_Mute), UnknownOutcome, late)
        yield self.fails(Factory.forProtocol(_Endless), UnknownOutcome, late)

    @inlineCallbacks
    def test_cancelled(self) -> Iterator[Deferred[Any]]:
        """A call that is cancelled during the response fails with ``CancelledError``."""
        client = yield self.listening(Factory.forProtocol(_Endless))
        calling = client.list_keys()
        yield deferLater(reactor, 0.3)
        calling.cancel()
        yield self.assertFailure(calling, CancelledError)

    @inlineCallbacks
    def test_no_server_of_ours(self) -> Iterator[Deferred[Any]]:
        """A response that no server of s2s sends is reported: HTML, JSON of another shape, or an endless body."""
        for status, body in (
            (200, b"<html>welcome</html>"),
            (200, b'{"items": [{"key_id": 5}], "next_cursor": null}'),
            (200, b"[]"),
            (502, b"<html>bad gateway</html>"),
            (500, b'{"code": "x"}'),
            (418, b"[1]"),
            (404, b""),
            (200, b"[" * 100_000),
        ):
            yield self.fails(Site(_Canned(status, body, {})), BadReply, "does not answer as a server of s2s")
        # Behind a gateway the server may have executed the request.
        for status, error in ((502, UnknownOutcome), (504, UnknownOutcome), (200, UnknownOutcome), (413, BadReply)):
            client = yield self.listening(Site(_Canned(status, b"<html>", {})))
            told = yield self.assertFailure(client.set_config("x", 1), error)
            self.assertIn(f"status {status}", str(told))
        self.patch(transport, "ANSWER_BYTES", 1000)
        yield self.fails(Factory.forProtocol(_Endless), BadReply, "more than 1000 bytes")

    @inlineCallbacks
    def test_redirects(self) -> Iterator[Deferred[Any]]:
        """The client does not follow redirects, so the token is not sent to another server."""
        elsewhere = _Canned(200, b'{"items": [], "next_cursor": null}', {})
        port = yield TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(Site(elsewhere))
        self.addCleanup(port.stopListening)
        away = {"Location": f"http://127.0.0.1:{port.getHost().port}/"}
        for status in (301, 302, 307, 308):
            yield self.fails(Site(_Canned(status, b"", away)), BadReply, f"status {status}")
        self.assertEqual(elsewhere.seen, [])


class Ipv6Tests(TestCase):
    """A server whose host is an IPv6 address."""

    @inlineCallbacks
    def test_an_address(self) -> Iterator[Deferred[Any]]:
        """The client connects to an IPv6 address."""
        canned = _Canned(200, b'{"items": [], "next_cursor": null}', {})
        port = yield TCP6ServerEndpoint(reactor, 0, interface="::1").listen(Site(canned))
        self.addCleanup(port.stopListening)
        client = AdminClient(f"http://[::1]:{port.getHost().port}", TOKEN)
        self.addCleanup(client.close)
        page = yield client.list_keys()
        self.assertEqual((page.items, canned.seen), ([], [b"/v1/keys"]))


class MistakeTests(SynchronousTestCase):
    """Mistakes of the caller."""

    def test_urls_and_tokens(self) -> None:
        """An invalid URL or token is refused at once, in one line without the token."""
        for url in (
            "", "localhost:8321", "ftp://x", "http://", "http://u:geheim@x", "http://u:geheim@x:port", "http://x?y=1",
            "http://x#y", "http://[::1", "http://[::geheim]", "http://x:abc", "http://x:0", "http://x:99999", "http://x:-1",
            "http://a..b", "http://" + "a" * 70, "http://x y", "http://x\x01", "http://[::1%25lo]",
        ):  # fmt: skip
            error = self.assertRaises(OperatorError, AdminClient, url, TOKEN)
            self.assertRegex(str(error), "^the URL of the server cannot be used: write http://HOST:PORT or https")
        for token in ("", "a b", "a\nb", "\u00e9"):
            error = self.assertRaises(OperatorError, AdminClient, "http://x", token)
            self.assertEqual(str(error), "the token cannot be used: it is one word, as s2s tokens add wrote it")

    def test_a_path_before_ours(self) -> None:
        """The path of the URL is a prefix of every request's path."""
        canned = _Canned(200, b'{"items": [], "next_cursor": null}', {})
        stub = StubTreq(canned)
        client = AdminClient("http://x/s2s/", TOKEN, http=stub)
        calling = client.call(config.LIST)
        stub.flush()
        self.assertEqual(self.successResultOf(calling).items, [])
        self.assertEqual(canned.seen, [b"/s2s/v1/config"])
