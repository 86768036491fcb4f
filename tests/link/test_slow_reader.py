"""An outbox of large commands is sent to a server that reads slowly, over one link, each row once.

The proxy that slows the network has its own tests here, so that a failure of the other tests is not the proxy's.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from tests.support.peer import PUSH, ListeningPeer
from tests.support.proxy import Proxy
from tests.support.roles import Engine, RoleTestCase
from tests.support.waiting import poll


class _SlowSocket:
    """A socket that is read in small pieces at a steady rate."""

    def __init__(self, link: socket.socket, bytes_per_second: int) -> None:
        # The kernel's buffer is small, because bytes in it would look as if they had been read.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        self._link = link
        self._rate = bytes_per_second
        self._free_at = time.monotonic()

    def recv(self, size: int) -> bytes:
        """Wait as long as the rate requires, then read."""
        time.sleep(max(0.0, self._free_at - time.monotonic()))
        data = self._link.recv(min(size, 8 << 10))
        self._free_at = max(self._free_at, time.monotonic() - 0.1) + len(data) / self._rate
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


class ProxyTests(TestCase):
    """:class:`Proxy` between two sockets."""

    async def setUp(self) -> None:
        """Connect through a proxy."""
        listening = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listening.close)
        self.proxy = Proxy(listening.getsockname()[1])
        await self.proxy.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(self.proxy.stop()))
        self.engine = socket.create_connection(("127.0.0.1", self.proxy.port))
        self.addCleanup(self.engine.close)
        listening.setblocking(False)
        await poll(lambda: len(self.proxy.ends) == 2, "both ends connected")
        self.server, _ = listening.accept()
        self.addCleanup(self.server.close)
        self.server.setblocking(False)
        self.arrived = b""

    def arrives(self) -> bytes | None:
        """Return all bytes that have arrived at the server, or ``None`` after the end."""
        try:
            more = self.server.recv(1 << 20)
        except BlockingIOError:
            return self.arrived
        except ConnectionResetError:
            return None
        self.arrived += more
        return self.arrived if more else None

    async def test_throttled(self) -> None:
        """Throttled bytes arrive complete, in order, and no sooner than the rate allows."""
        sent = bytes(range(250)) * 200
        self.proxy.up.bytes_per_second = 100_000
        began = time.monotonic()
        self.engine.sendall(sent)
        self.engine.close()
        await poll(lambda: self.arrives() is None, "the end")
        self.assertEqual((self.arrived, self.proxy.up.forwarded), (sent, len(sent)))
        self.assertGreater(time.monotonic() - began, 0.45)

    async def test_stalled(self) -> None:
        """While the proxy is stalled neither bytes nor the end arrive; afterwards all of them do."""
        self.proxy.stall()
        self.engine.sendall(b"x" * 1000)
        self.engine.close()
        await poll(lambda: len(self.proxy.ends) == 1, "the proxy knows")
        self.assertEqual((self.arrives(), self.proxy.up.forwarded), (b"", 0))
        self.proxy.go_on()
        await poll(lambda: self.arrives() is None, "the end")
        self.assertEqual(self.arrived, b"x" * 1000)

    async def test_garbled(self) -> None:
        """One bit of one given byte is flipped, and no later byte is changed."""
        self.proxy.up.garble(after=1500)
        for _ in range(3):
            self.engine.sendall(b"\0" * 1000)
        await poll(lambda: len(self.arrives() or b"") == 3000, "all there")
        self.assertEqual(self.arrived, b"\0" * 1500 + b"\1" + b"\0" * 1499)

    async def test_cut(self) -> None:
        """A cut ends every connection at both ends, and the next connection is a new one."""
        self.proxy.cut()
        await poll(lambda: self.arrives() is None, "the end at the server")
        self.assertRaises(ConnectionResetError, self.engine.recv, 1)
        self.assertEqual((self.proxy.connections, self.proxy.ends), (1, set()))


class SlowReaderTests(RoleTestCase):
    """A real engine whose bytes arrive slowly."""

    def put(self, count: int, text: str) -> None:
        """Add notices to the outbox."""
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) select 'notice.publish', 'slow:' || n,"
            " jsonb_build_object('scope', 'global', 'message', %s::text, 'severity', 'info')"
            " from generate_series(1, %s) n",
            text,
            count,
        )

    def drained(self, timeout: float) -> Deferred[Any]:
        """Wait until the outbox is empty, including rows that are set aside."""
        return poll(lambda: self.count("outbox") == 0, "an empty outbox", timeout=timeout)

    def assert_one_link(self, engine: Engine) -> None:
        """Assert that the engine has never lost its link."""
        self.assertEqual((len(engine.lines("link up")), engine.lines("link down")), (1, []))

    @inlineCallbacks
    def test_a_peer_that_reads_slowly(self) -> Iterator[Deferred[Any]]:
        """Frames of 60 KB to a peer that reads 300 KB a second: none is sent twice."""
        count = 30
        self.put(count, "x" * 60_000)
        listening = ListeningPeer()
        self.addCleanup(listening.close)
        engine = self.engine(listening.port)
        yield engine.start()
        seen: Counter[str] = Counter()

        def serve() -> None:
            peer = listening.accept()
            self.addCleanup(peer.close)
            peer.link = _SlowSocket(peer.link, 300_000)  # type: ignore[assignment]
            while len(seen) < count:
                push = peer.request(PUSH)
                seen[push["payload"]["idem_key"]] += 1
                peer.reply(push, "s2s.ack", {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"})

        yield deferToThread(serve)
        yield self.drained(5.0)
        self.assertEqual(set(seen.values()), {1})
        self.assert_one_link(engine)

    @inlineCallbacks
    def test_a_slow_network(self) -> Iterator[Deferred[Any]]:
        """Frames of 16 KB to a real server over 200 KB/s all arrive over one connection, and none twice."""
        count = 60
        server = self.server()
        yield server.start()
        proxy = Proxy(server.port)
        yield Deferred.fromCoroutine(proxy.start())
        self.addCleanup(lambda: Deferred.fromCoroutine(proxy.stop()))
        proxy.up.bytes_per_second = 200_000
        self.put(count, "\N{ROCKET}" * 4000)
        engine = self.engine(proxy.port)
        yield engine.start()
        yield self.drained(20.0)
        self.assertEqual(self.execute("select count(*)::int from s2s.commands"), [(count,)])
        # A second transmission of one frame would exceed this bound.
        self.assertLess(proxy.up.forwarded, count * 16_600 + 8_000)
        self.assertEqual(proxy.connections, 1)
        self.assert_one_link(engine)
