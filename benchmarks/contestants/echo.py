"""A bare Int32StringReceiver that echoes every frame: the limit of the framework."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.protocols.basic import Int32StringReceiver

from benchmarks.contestants import _twisted
from benchmarks.kits import drive_deferred
from benchmarks.load import Load, Meter, Place


class _Echo(Int32StringReceiver):
    MAX_LENGTH = 1 << 20

    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)


class _Asks(Int32StringReceiver):
    MAX_LENGTH = 1 << 20

    def __init__(self) -> None:
        self._waiting: deque[Deferred[bytes]] = deque()

    def ask(self, frame: bytes) -> Deferred[bytes]:
        self.sendString(frame)
        waiter: Deferred[bytes] = Deferred()
        self._waiting.append(waiter)
        return waiter

    def stringReceived(self, string: bytes) -> None:
        self._waiting.popleft().callback(string)


def serve(place: Place) -> None:
    """Send every frame back."""
    _twisted.serve(place, Factory.forProtocol(_Echo))


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Send frames, and wait for each to come back."""
    frame = b"x" * load.size

    async def driving() -> None:
        links: list[Any] = [await _twisted.connect(place, Factory.forProtocol(_Asks)) for _ in range(load.links)]
        await drive_deferred([lambda link=link: link.ask(frame) for link in links], load, meter)

    _twisted.run(driving())
