"""The write buffer: the frames of one reactor iteration are sent together (:mod:`s2s.link.write_buffer`)."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionLost
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from s2s.link.write_buffer import FLUSH_BYTES, MOST_FLUSH_BYTES, WriteBuffer
from s2s.protocol.limits import Counters
from tests.support.descriptor import Descriptor

#: Three of these are sent before the reactor iteration ends.
_FRAME = b"x" * (FLUSH_BYTES // 3 + 1)


class _Wrapper:
    """A transport that exposes the attributes of the transport below it, as TLS does."""

    def __init__(self, below: Descriptor) -> None:
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


class FlushTests(SynchronousTestCase):
    """The times at which frames are sent."""

    def setUp(self) -> None:
        """Make a connection."""
        self.transport = Descriptor()
        self.counters = Counters()
        self.writer = WriteBuffer(self.transport, self.counters)

    def test_few_frames(self) -> None:
        """Frames of one iteration are sent together at its end, and the reactor does not watch the socket."""
        for each in (b"a", b"b", b"c"):
            self.writer.write(each)
        self.assertEqual(self.transport.sends, [])
        self.transport.reactor.advance(0)
        self.writer.write(b"d")
        self.assertEqual(self.transport.sends, [b"abc"])
        self.transport.reactor.advance(0)
        self.assertEqual((self.transport.sends, self.transport.reactor.writers), ([b"abc", b"d"], set()))

    def test_many_frames(self) -> None:
        """Flushes happen after a number of bytes, then after twice as many, up to a bound, and at the iteration's end.

        The next iteration starts with the first number again.
        """
        sizes = [3, 6, 12, 24, 24]
        self.assertEqual(len(_FRAME) * sizes[-1] // MOST_FLUSH_BYTES, 1)
        for _ in range(sum(sizes) + 1):
            self.writer.write(_FRAME)
        self.assertEqual([len(each) // len(_FRAME) for each in self.transport.sends], sizes)
        self.transport.reactor.advance(0)
        for _ in range(3):
            self.writer.write(_FRAME)
        self.transport.reactor.advance(0)
        for _ in range(3):
            self.writer.write(_FRAME)
        self.assertEqual([len(each) // len(_FRAME) for each in self.transport.sends], [*sizes, 1, 3, 3])
        self.transport.reactor.advance(0)
        self.assertEqual(self.transport.reactor.getDelayedCalls(), [])

    def test_a_peer_that_does_not_read(self) -> None:
        """A transport with a full buffer gets no more bytes; in the end it gets all of them, in order."""
        self.writer.pauseProducing()
        written = [bytes([n]) for n in range(200)]
        for each in written:
            self.writer.write(each, is_urgent=True)
        self.transport.reactor.turn()
        self.assertEqual((self.transport.sends, self.writer.waiting_bytes), ([], len(written)))
        self.assertEqual(self.counters.waiting_bytes, len(written))
        self.writer.resumeProducing()
        self.transport.reactor.turn()
        self.assertEqual((self.transport.sends, self.writer.waiting_bytes), ([b"".join(written)], 0))
        self.assertEqual(self.counters.waiting_bytes, 0)

    def test_urgent(self) -> None:
        """An urgent frame is sent at once, with all frames that were written before it."""
        for each, is_urgent in ((b"a", False), (b"b", True), (b"c", True), (b"d", False)):
            self.writer.write(each, is_urgent)
        self.assertEqual(self.transport.sends, [b"ab", b"c"])

    def test_a_socket_that_takes_less(self) -> None:
        """The transport gets the bytes that the socket did not accept, and finds the reason itself."""
        for takes, sends in ((3, [b"abc"]), (2, [b"ab"]), (0, []), (ConnectionLost(), [])):
            transport = Descriptor()
            transport.takes = takes
            WriteBuffer(transport, Counters()).write(b"abc", is_urgent=True)
            self.assertEqual(transport.sends, sends)
            self.assertEqual(transport.dataBuffer, b"abc"[len(b"".join(sends)) :])
            self.assertEqual(transport.reactor.writers, {transport} if transport.dataBuffer else set())

    def test_a_socket_that_takes_more_again(self) -> None:
        """When the transport has sent the rest, the reactor no longer watches the socket."""
        self.transport.takes = 2
        self.writer.write(b"abc", is_urgent=True)
        self.transport.takes = 9
        self.transport.reactor.turn()
        self.patch(self.transport, "startWriting", lambda: self.fail("it is watched"))
        self.writer.write(b"d", is_urgent=True)
        self.assertEqual(self.transport.sends, [b"ab", b"c", b"d"])

    def test_nothing_overtakes(self) -> None:
        """Bytes in the transport's buffer are sent before later frames, wherever those wait."""
        self.transport.write(b"v")
        self.transport.takes = 0
        self.transport.reactor.turn()
        self.transport.takes = 9
        self.writer.write(b"w", is_urgent=True)
        self.writer.pauseProducing()
        self.writer.write(b"x")
        self.writer.resumeProducing()
        self.writer.write(b"y", is_urgent=True)
        self.writer.write(b"z")
        self.writer.finish()
        self.transport.reactor.turn()
        self.assertEqual(b"".join(self.transport.sends), b"vwxyz")

    @given(
        st.lists(
            st.tuples(st.just("write"), st.integers(1, 3 * FLUSH_BYTES), st.booleans())
            | st.tuples(st.sampled_from(["turn", "take"]), st.integers(0, 9 * FLUSH_BYTES), st.booleans())
        ),
        st.booleans(),
    )
    @example([("take", 5, False), *[("write", 1, True)] * 9, ("take", 5, False), ("turn", 0, False)], False)
    def test_any_order_of_events(self, events: list[tuple[str, int, bool]], is_closed: bool) -> None:
        """For any order of frames and socket states each byte is sent once, in order, and waiting bytes are counted."""
        transport = Descriptor()
        writer, written = WriteBuffer(transport, Counters()), b""
        transport.takes = 0
        for event, size, is_urgent in events:
            if event == "write":
                frame = bytes(n % 251 for n in range(len(written), len(written) + size))
                written += frame
                writer.write(frame, is_urgent)
            elif event == "turn":
                transport.reactor.turn()
            else:
                transport.takes = size
            self.assertTrue(written.startswith(b"".join(transport.sends)))
            held = len(transport.dataBuffer) - transport.offset + transport._tempDataLen + writer.waiting_bytes
            self.assertLess(len(written) - len(b"".join(transport.sends)) - held, MOST_FLUSH_BYTES)
        transport.takes = 1 << 30
        if is_closed:
            writer.finish()
        while transport.reactor.writers or transport.reactor.getDelayedCalls():
            transport.reactor.turn()
        self.assertEqual(b"".join(transport.sends), written)
        self.assertEqual(writer.waiting_bytes, 0)

    def test_a_descriptor_that_closes(self) -> None:
        """A closing descriptor, and one below TLS, are left to the reactor, which must see the last byte written."""
        below = Descriptor()
        above = WriteBuffer(_Wrapper(below), Counters())
        self.transport.disconnecting = True
        for writer in (self.writer, above):
            writer.write(b"x", is_urgent=True)
        self.assertEqual((self.transport.sends, below.sends), ([], []))
        for transport in (self.transport, below):
            transport.reactor.turn()
        self.assertEqual((self.transport.sends, below.sends), ([b"x"], [b"x"]))

    def test_gone(self) -> None:
        """A closed transport gets no more bytes."""
        self.writer.write(b"x")
        self.writer.stopProducing()
        self.transport.takes = AssertionError()
        self.transport.reactor.turn()
        self.assertEqual((self.transport.sends, self.transport.dataBuffer), ([], b""))

    def test_no_descriptor(self) -> None:
        """A transport that is not a descriptor sends by itself."""
        transport: Any = StringTransport()
        writer = WriteBuffer(transport, Counters())
        for _ in range(7):
            writer.write(_FRAME)
        self.assertEqual(transport.value(), _FRAME * 7)
