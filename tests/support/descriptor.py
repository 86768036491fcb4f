"""A connection on Twisted's own write buffer, without a socket."""

from __future__ import annotations

from twisted.internet import task
from twisted.internet.abstract import FileDescriptor


class Reactor(task.Clock):
    """The part of a reactor that a writing descriptor needs.

    :ivar writers: the descriptors that are watched for writability.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[FileDescriptor] = set()
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard

    def removeReader(self, descriptor: FileDescriptor) -> None:
        """Do nothing: no descriptor is watched for reading."""

    def turn(self) -> None:
        """Run the calls that are due, and let each watched descriptor write."""
        self.advance(0)
        for each in list(self.writers):
            each.doWrite()


class Descriptor(FileDescriptor):
    """A connection on Twisted's own buffer.

    :ivar sends: the bytes of each send that the simulated socket accepted.
    :ivar takes: number of bytes that the socket still accepts, or the error that it returns.
    """

    connected = True

    def __init__(self) -> None:
        super().__init__(Reactor())
        self.sends: list[bytes] = []
        self.takes: int | Exception = 1 << 20

    def getPeer(self) -> object:
        """Return no address, as for a local socket."""
        return None

    def writeSomeData(self, data: bytes) -> int | Exception:
        """Accept as many bytes as ``takes`` permits, or return its error."""
        if isinstance(self.takes, Exception):
            return self.takes
        taken = bytes(data[: self.takes])
        self.takes -= len(taken)
        self.sends += [taken] * bool(taken)
        return len(taken)
