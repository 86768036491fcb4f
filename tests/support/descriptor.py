"""A connection on Twisted's own write buffer, without a socket."""

from __future__ import annotations

from twisted.internet import task
from twisted.internet.abstract import FileDescriptor


class Reactor(task.Clock):
    """As much of a reactor as a descriptor wants that writes.

    :ivar writers: whom it watches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[FileDescriptor] = set()
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard

    def removeReader(self, descriptor: FileDescriptor) -> None:
        """Nobody is read."""

    def turn(self) -> None:
        """Call what is due, and whoever may write."""
        self.advance(0)
        for each in list(self.writers):
            each.doWrite()


class Descriptor(FileDescriptor):
    """A connection on Twisted's own buffer.

    :ivar sends: what its socket took, each time that it took something.
    :ivar takes: how many bytes the socket takes yet, or how it fails.
    """

    connected = True

    def __init__(self) -> None:
        super().__init__(Reactor())
        self.sends: list[bytes] = []
        self.takes: int | Exception = 1 << 20

    def getPeer(self) -> object:
        """It comes from nowhere, as over a local socket."""
        return None

    def writeSomeData(self, data: bytes) -> int | Exception:
        """Let the socket take something."""
        if isinstance(self.takes, Exception):
            return self.takes
        taken = bytes(data[: self.takes])
        self.takes -= len(taken)
        self.sends += [taken] * bool(taken)
        return len(taken)
