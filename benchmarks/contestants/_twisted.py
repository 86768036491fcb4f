"""Run either side of a contestant on Twisted's reactor."""

from __future__ import annotations

import socket
import sys
from collections.abc import Coroutine
from typing import Any

from twisted.internet import reactor, stdio
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from benchmarks.load import Place


class _UntilTheEnd(Protocol):
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        reactor.stop()


def serve(place: Place, factory: Factory) -> None:
    """Listen until stdin ends."""
    port: Any = reactor.listenTCP(place.port, factory, backlog=1024, interface="127.0.0.1")
    # Accepted sockets inherit this option: no answer waits for a TCP acknowledgement.
    port.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stdio.StandardIO(_UntilTheEnd())
    reactor.run()


async def connect(place: Place, factory: Factory) -> Any:
    """Make a connection, and return its protocol."""
    protocol = await TCP4ClientEndpoint(reactor, "127.0.0.1", place.port).connect(factory)
    protocol.transport.setTcpNoDelay(True)
    return protocol


def run(driving: Coroutine[Any, Any, None]) -> None:
    """Run the reactor until the coroutine ends."""
    failures: list[Failure] = []

    def begin() -> None:
        done = Deferred.fromCoroutine(driving).addErrback(failures.append)
        done.addBoth(lambda _: reactor.running and reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    for failure in failures:
        failure.printTraceback(sys.stderr)
        sys.exit(1)
