"""What waits to be written: many frames of one turn do not wait for its end (:mod:`s2s.writer`)."""

from __future__ import annotations

from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionLost
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from s2s.writer import FLUSH_FRAMES, Writer


class _Descriptor(StringTransport, FileDescriptor):
    """A descriptor that says when it was made to send.

    :ivar passed: what its socket took past the buffer.
    :ivar takes: how much the socket takes at once, or how it fails.
    """

    def __init__(self) -> None:
        StringTransport.__init__(self)
        self.sent: list[int] = []
        self.passed = b""
        self.takes: int | Exception = 1 << 20

    def doWrite(self) -> None:
        """Send what was written."""
        self.sent.append(len(self.value()))

    def writeSomeData(self, data: bytes) -> int | Exception:
        """Send past the buffer."""
        if isinstance(self.takes, Exception):
            return self.takes
        self.passed += data[: self.takes]
        return min(self.takes, len(data))


class _Wrapper:
    """A transport that gives out what is below it as its own, as TLS does."""

    def __init__(self, below: _Descriptor) -> None:
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


class FlushTests(SynchronousTestCase):
    """When frames are sent."""

    def test_many_frames(self) -> None:
        """After so many frames they are sent at once, and again after as many more; fewer wait for the reactor."""
        transport = _Descriptor()
        writer = Writer(transport)
        for _ in range(2 * FLUSH_FRAMES + FLUSH_FRAMES // 2):
            writer.write(b"x")
        self.assertEqual(transport.sent, [FLUSH_FRAMES, 2 * FLUSH_FRAMES])

    def test_a_peer_that_does_not_read(self) -> None:
        """Nothing is forced on a transport that has enough; in the end all of it comes, in order."""
        transport = _Descriptor()
        writer = Writer(transport)
        writer.pauseProducing()
        written = [bytes([n]) for n in range(3 * FLUSH_FRAMES)]
        for each in written:
            writer.write(each)
        self.assertEqual((transport.sent, transport.value(), writer.waiting_bytes), ([], b"", len(written)))
        writer.resumeProducing()
        self.assertEqual((transport.value(), writer.waiting_bytes), (b"".join(written), 0))

    def test_urgent(self) -> None:
        """What is urgent is sent with all that was written before it, and then the count begins anew."""
        transport = _Descriptor()
        writer = Writer(transport)
        for _ in range(FLUSH_FRAMES - 2):
            writer.write(b"x")
        writer.write(b"x", is_urgent=True)
        writer.write(b"x")
        self.assertEqual((transport.sent, transport.passed), ([FLUSH_FRAMES - 1], b""))
        writer.pauseProducing()
        writer.write(b"x", is_urgent=True)
        self.assertEqual((transport.sent, writer.waiting_bytes), ([FLUSH_FRAMES - 1], 1))

    def test_nothing_before_it(self) -> None:
        """With nothing before it the socket gets what is urgent at once; the transport gets what it did not take."""
        for takes, passed in ((3, b"abc"), (2, b"ab"), (0, b""), (ConnectionLost(), b"")):
            transport = _Descriptor()
            transport.takes = takes
            writer = Writer(transport)
            writer.write(b"abc", is_urgent=True)
            self.assertEqual((transport.passed, transport.value()), (passed, b"abc"[len(passed) :]))

    def test_nothing_overtakes(self) -> None:
        """What the transport did not send yet goes before what is urgent, whoever gave it."""
        transport = _Descriptor()
        writer = Writer(transport)
        transport.dataBuffer = b"x"
        writer.write(b"y", is_urgent=True)
        transport.dataBuffer = b""
        writer.pauseProducing()
        writer.write(b"z")
        writer.resumeProducing()
        writer.write(b"!", is_urgent=True)
        self.assertEqual((transport.value(), transport.passed), (b"yz!", b""))

    def test_a_descriptor_that_closes(self) -> None:
        """What closes is left to the reactor, which must see the last of it written; so is what lies below TLS."""
        transport, below = _Descriptor(), _Descriptor()
        writer, above = Writer(transport), Writer(_Wrapper(below))
        transport.disconnecting = True
        for each in (writer, above):
            each.write(b"x", is_urgent=True)
        self.assertEqual((transport.sent, below.sent, transport.passed + below.passed), ([], [], b""))
        transport.disconnecting = False
        writer.write(b"x", is_urgent=True)
        self.assertEqual(transport.sent, [2])

    def test_no_descriptor(self) -> None:
        """A transport that cannot be made to send does so by itself."""
        transport: Any = StringTransport()
        writer = Writer(transport)
        for _ in range(2 * FLUSH_FRAMES):
            writer.write(b"x")
        self.assertEqual(transport.value(), b"x" * 2 * FLUSH_FRAMES)
