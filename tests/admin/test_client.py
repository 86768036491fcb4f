"""The client: in memory against the real resource, and against servers of all kinds."""

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
from s2s.admin.operations import OPERATIONS, config
from s2s.errors import BadReply, CallError, OperatorError, Refused, UnknownOutcome, Unreachable
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store import pool
from s2s.store.access import make
from s2s.store.tables import tokens
from s2s.store.tables.commands_admin import CommandRow
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import free_port

TOKEN = make("x")


class _Inline:
    """A pool whose work is done at once, on one connection of the test's own database."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        """Do it."""
        return succeed(pool.step(self._txn, lambda txn: work(txn, *args)))


class InMemoryTests(DatabaseTestCase):
    """The real API on the real tables, without a socket."""

    def setUp(self) -> None:
        """Make both ends."""
        super().setUp()
        blocking = pool.blocking(self.url)
        txn = blocking.__enter__()
        self.addCleanup(blocking.__exit__, None, None, None)
        token = pool.step(txn, lambda txn: tokens.add(txn, "alice", "admin"))
        database: Any = _Inline(txn)

        async def ready() -> dict[str, str]:
            return {"database": "ok", "pushes": "ok", "executor": "ok"}

        self.time = FakeTime()
        web = Web(database, Clock(self.time), Counters(), ready)
        web.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(web.stop()))
        self.stub = StubTreq(web.site.resource)
        self.client = AdminClient("http://localhost", token, http=self.stub)

    def call(self, calling: Deferred[Any]) -> Any:
        """Let a call come to its end."""
        self.pass_time()
        return self.successResultOf(calling)

    def pass_time(self) -> None:
        """Let what is sent arrive, what waits for a moment wait, and what is answered arrive."""
        self.stub.flush()
        self.time.advance(1)
        self.stub.flush()

    def refused(self, calling: Deferred[Any]) -> Refused:
        """Let a call be refused."""
        self.pass_time()
        return self.failureResultOf(calling, Refused).value

    def test_typed(self) -> None:
        """Rows come as the classes that the tables have, times as times."""
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
        """A list is walked to its end, page by page, each row once; a filter goes along."""
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
        """What the server refuses comes with its code, its words and its details."""
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
        """A name goes whole, whatever is in it."""
        for name in ("a/b", "a b", "\u00e9", "a?b#c", "%2F", "..a", "'; drop table engines; --"):
            self.execute("insert into s2s.engines (name, wanted) values (%s, 'paused')", name)
            shown = self.call(self.client.show_engine(name))
            self.assertEqual((shown.name, shown.state), (name, "no link"))
            self.assertEqual(self.refused(self.client.pause_engine(name, reason="x")).code, "not_ready")

    def test_every_operation(self) -> None:
        """There is a method for each operation, which takes each of its members."""
        for operation in OPERATIONS:
            if operation.takes_key:
                continue
            members = {*operation.path_params, *operation.query, *operation.body_schema.document.get("properties", {})}
            taken = {
                name.removesuffix("_s") for name in inspect.signature(getattr(AdminClient, operation.name)).parameters
            }
            with self.subTest(operation=operation.name):
                self.assertEqual(taken - {"self"}, {name.removesuffix("_s") for name in members})


class _Canned(Resource):
    """Answers everything alike."""

    isLeaf = True

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        super().__init__()
        self._answer = (status, body, headers)
        self.seen: list[Any] = []

    def render(self, request: Any) -> bytes:
        """Answer."""
        status, body, headers = self._answer
        self.seen.append(request.uri)
        request.setResponseCode(status)
        for name, value in headers.items():
            request.setHeader(name, value)
        return body


class _Mute(Protocol):
    """Takes a request and closes, or does nothing at all."""

    closes = True

    def dataReceived(self, data: bytes) -> None:
        """Close."""
        if self.closes:
            self.transport.loseConnection()


class _Endless(Protocol):
    """Answers, and does not come to the end."""

    def dataReceived(self, data: bytes) -> None:
        """Say a part."""
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b" " * 1001)


class NetworkTests(DatabaseTestCase):
    """Against sockets that are no server of ours."""

    @inlineCallbacks
    def listening(self, factory: Any, scheme: str = "http") -> Iterator[Deferred[Any]]:
        """Listen, and give a client."""
        port = yield TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(factory)
        self.addCleanup(port.stopListening)
        client = AdminClient(f"{scheme}://127.0.0.1:{port.getHost().port}", TOKEN)
        self.addCleanup(client.close)
        return client

    @inlineCallbacks
    def fails(self, factory: Any, kind: type[CallError], told: str) -> Iterator[Deferred[Any]]:
        """See that a call fails."""
        client = yield self.listening(factory)
        error = yield self.assertFailure(client.list_keys(), kind)
        self.assertRegex(str(error), told)
        self.assertNotIn(TOKEN, str(error) + repr(client))

    @inlineCallbacks
    def test_nobody(self) -> Iterator[Deferred[Any]]:
        """Where nobody listens nothing was sent, and that is said."""
        client = AdminClient(f"http://127.0.0.1:{free_port()}", TOKEN)
        error = yield self.assertFailure(client.list_keys(), Unreachable)
        self.assertRegex(str(error), r"^http://127.0.0.1:\d+ does not answer: .*refused")
        error = yield self.assertFailure(AdminClient("http://no.such.host.invalid", TOKEN).list_keys(), Unreachable)
        self.assertIn("does not answer", str(error))

    @inlineCallbacks
    def test_lost(self) -> Iterator[Deferred[Any]]:
        """Where the answer is lost, or does not come in time, the outcome is unknown."""
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
        """Whoever gives up while an answer comes is not told of a lost one."""
        client = yield self.listening(Factory.forProtocol(_Endless))
        calling = client.list_keys()
        yield deferLater(reactor, 0.3)
        calling.cancel()
        yield self.assertFailure(calling, CancelledError)

    @inlineCallbacks
    def test_no_server_of_ours(self) -> Iterator[Deferred[Any]]:
        """What is no answer of ours is said to be none: a page, a list of something else, an answer without an end."""
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
        # Behind a gateway the server may have done what was asked.
        for status, error in ((502, UnknownOutcome), (504, UnknownOutcome), (200, UnknownOutcome), (413, BadReply)):
            client = yield self.listening(Site(_Canned(status, b"<html>", {})))
            told = yield self.assertFailure(client.set_config("x", 1), error)
            self.assertIn(f"status {status}", str(told))
        self.patch(transport, "ANSWER_BYTES", 1000)
        yield self.fails(Factory.forProtocol(_Endless), BadReply, "more than 1000 bytes")

    @inlineCallbacks
    def test_redirects(self) -> Iterator[Deferred[Any]]:
        """A token is not taken to where a redirect leads."""
        elsewhere = _Canned(200, b'{"items": [], "next_cursor": null}', {})
        port = yield TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(Site(elsewhere))
        self.addCleanup(port.stopListening)
        away = {"Location": f"http://127.0.0.1:{port.getHost().port}/"}
        for status in (301, 302, 307, 308):
            yield self.fails(Site(_Canned(status, b"", away)), BadReply, f"status {status}")
        self.assertEqual(elsewhere.seen, [])


class Ipv6Tests(TestCase):
    """Where an address is no name."""

    @inlineCallbacks
    def test_an_address(self) -> Iterator[Deferred[Any]]:
        """A server is reached by its IPv6 address."""
        canned = _Canned(200, b'{"items": [], "next_cursor": null}', {})
        port = yield TCP6ServerEndpoint(reactor, 0, interface="::1").listen(Site(canned))
        self.addCleanup(port.stopListening)
        client = AdminClient(f"http://[::1]:{port.getHost().port}", TOKEN)
        self.addCleanup(client.close)
        page = yield client.list_keys()
        self.assertEqual((page.items, canned.seen), ([], [b"/v1/keys"]))


class MistakeTests(SynchronousTestCase):
    """What the caller gets wrong."""

    def test_urls_and_tokens(self) -> None:
        """A URL or a token that cannot be one is refused at once, in a line that holds no token."""
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
        """A server behind a path is reached there."""
        canned = _Canned(200, b'{"items": [], "next_cursor": null}', {})
        stub = StubTreq(canned)
        client = AdminClient("http://x/s2s/", TOKEN, http=stub)
        calling = client.call(config.LIST)
        stub.flush()
        self.assertEqual(self.successResultOf(calling).items, [])
        self.assertEqual(canned.seen, [b"/s2s/v1/config"])
