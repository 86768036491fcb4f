"""A bound on the TLS handshakes of a port (docs/protocol.rst, "Strangers").

A client that sends the first message of a handshake and nothing more costs the server about 1 ms, because the server
makes a link, a TLS connection and a signature. So a connection takes its turn before any of these is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.protocol.limits import Counters
from s2s.runtime.budget import Budget, network
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import LineQuota

#: Maximum handshakes a second on one port: of one address, and of all addresses. One takes about 1 ms of the reactor's
#: time, so all of them take about 15 % of a core.
HANDSHAKES: Final = (100, 150)
#: Maximum connections that wait for their handshake, which takes them 1 s at most. Beyond it, connections of the
#: address that has the most of them are closed.
MOST_WAITING: Final = 100


class _Waiting(Protocol):
    """A connection that waits for its handshake. Nothing of it is read meanwhile."""

    transport: Any

    def __init__(self, gate: HandshakeGate, address: IAddress | None, network: str) -> None:
        self.network = network
        self._gate = gate
        self._address = address

    def connectionMade(self) -> None:
        """Stop reading."""
        self.transport.pauseProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Leave the queue."""
        self._gate.waiting.pop(self, None)

    def cut(self) -> None:
        """Close the connection unanswered."""
        self._gate.waiting.pop(self, None)
        self.transport.abortConnection()

    def begin(self) -> None:
        """Pass the connection to TLS."""
        del self._gate.waiting[self]
        self.transport.resumeProducing()
        self.transport.protocol = self._gate.tls.buildProtocol(self._address)
        self.transport.protocol.makeConnection(self.transport)


class HandshakeGate(Factory):
    """The factory of a TLS port's connections: each waits for its turn, or is closed unanswered.

    :param tls: the factory of TLS connections.
    :param described: the endpoint, for the log.
    :ivar waiting: the connections that wait, in the order of their arrival.
    """

    log = Logger()
    noisy = False

    def __init__(self, tls: Any, described: str, clock: Clock, counters: Counters) -> None:
        self.tls = tls
        self.waiting: dict[_Waiting, None] = {}
        self._described = described
        self._counters = counters
        self._budget = Budget(HANDSHAKES, clock)
        self._lines = LineQuota(clock.scheduler, self._tell, most=1)

    def doStart(self) -> None:
        """Prepare the wrapped factory."""
        self.tls.doStart()

    def doStop(self) -> None:
        """Close the waiting connections, and log the counts of the closed ones."""
        for each in list(self.waiting):
            each.cut()
        self._lines.stop()
        self.tls.doStop()

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Return a protocol for a connection, or ``None`` if the connection must be closed."""
        wait = _Waiting(self, addr, network(str(getattr(addr, "host", ""))))
        if len(self.waiting) >= MOST_WAITING and not self._make_room(wait.network):
            self._count_closed(wait.network)
            return None
        if self._budget.take(wait.network, 1, lambda: wait in self.waiting, wait.begin):
            return self.tls.buildProtocol(addr)
        self._counters.meet("handshakes")
        self.waiting[wait] = None
        return wait

    def _make_room(self, network: str) -> bool:
        """Close the newest waiting connection of the crowd, unless a connection of the given network is of the crowd.

        :returns: ``False`` if nothing was closed.
        """
        counts = Counter(each.network for each in self.waiting)
        [(crowd, count)] = counts.most_common(1)
        if counts[network] >= count:
            return False
        next(each for each in reversed(self.waiting) if each.network == crowd).cut()
        self._count_closed(crowd)
        return True

    def _count_closed(self, network: str) -> None:
        self._counters.meet("handshakes_closed")
        if self._lines.may_tell(network):
            self._tell({network: 1})

    def _tell(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} from {network or 'a local socket'}" for network, count in untold.items())
        self.log.warn(
            "{endpoint}: TLS connections closed unanswered: {told}: at most {one} handshakes a second are made with one"
            " address, and {all} in all: find the host that opens them, and block its address in the firewall",
            endpoint=self._described,
            told=told,
            one=HANDSHAKES[0],
            all=HANDSHAKES[1],
        )
