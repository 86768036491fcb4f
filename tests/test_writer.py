"""What waits to be written: many frames of one turn do not wait for its end (:mod:`s2s.writer`)."""

from __future__ import annotations

from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from s2s.writer import FLUSH_FRAMES, Writer


class _Descriptor(StringTransport, FileDescriptor):
    """A descriptor that says when it was made to send."""

    def __init__(self) -> None:
        StringTransport.__init__(self)
        self.sent: list[int] = []

    def doWrite(self) -> None:
        """Send what was written."""
        self.sent.append(len(self.value()))


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

    def test_asked_for(self) -> None:
        """What was written is sent when somebody asks, and then the count begins anew."""
        transport = _Descriptor()
        writer = Writer(transport)
        for _ in range(FLUSH_FRAMES - 1):
            writer.write(b"x")
        writer.flush()
        writer.write(b"x")
        self.assertEqual(transport.sent, [FLUSH_FRAMES - 1])
        writer.pauseProducing()
        writer.flush()
        self.assertEqual(transport.sent, [FLUSH_FRAMES - 1])

    def test_a_descriptor_that_closes(self) -> None:
        """What closes is left to the reactor, which must see the last of it written; so is what lies below TLS."""
        transport, below = _Descriptor(), _Descriptor()
        writer, above = Writer(transport), Writer(_Wrapper(below))
        transport.disconnecting = True
        for each in (writer, above):
            each.write(b"x")
            each.flush()
        self.assertEqual((transport.sent, below.sent), ([], []))
        transport.disconnecting = False
        writer.flush()
        self.assertEqual(transport.sent, [1])

    def test_no_descriptor(self) -> None:
        """A transport that cannot be made to send does so by itself."""
        transport: Any = StringTransport()
        writer = Writer(transport)
        for _ in range(2 * FLUSH_FRAMES):
            writer.write(b"x")
        self.assertEqual(transport.value(), b"x" * 2 * FLUSH_FRAMES)
