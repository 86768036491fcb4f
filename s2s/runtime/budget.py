"""Rate limits for unauthenticated peers: one for each address, and one for all."""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from s2s.runtime.clock import Clock

#: Seconds of a rate that may be used in one burst.
BURST_S: Final = 2.0
#: Seconds between two checks of the queues.
LOOK_S: Final = 0.05
#: The most addresses that are kept; beyond it, addresses with a full bucket are dropped, which are nearly all.
MOST_ADDRESSES: Final = 4096


@dataclass
class _Bucket:
    """A token bucket: the units that may be taken now. It fills with time."""

    rate: int
    level: float
    at: float

    def has(self, size: int, mono: float) -> bool:
        self._fill(mono)
        return self.level >= size

    def is_full(self, mono: float) -> bool:
        self._fill(mono)
        return self.level >= self._burst

    @property
    def _burst(self) -> float:
        return self.rate * BURST_S

    def _fill(self, mono: float) -> None:
        self.level = min(self._burst, self.level + (mono - self.at) * self.rate)
        self.at = mono


@dataclass
class _Wait:
    size: int
    is_wanted: Callable[[], bool]
    go_on: Callable[[], object]


class Budget:
    """A number of units a second, for each address and for all; a request without room waits in a queue of its address.

    The queues are as long as the number of connections that may wait, which the user of this class bounds.

    :param rates: units a second of one address, and of all addresses.
    """

    def __init__(self, rates: tuple[int, int], clock: Clock) -> None:
        self._clock = clock
        self._rate = rates[0]
        self._all = self._full(rates[1])
        self._by_address: dict[str, _Bucket] = {}
        #: By address; the address that was served last stands last.
        self._lines: dict[str, deque[_Wait]] = {}

    def _full(self, rate: int) -> _Bucket:
        return _Bucket(rate, rate * BURST_S, self._clock.mono())

    def take(self, address: str, size: int, is_wanted: Callable[[], bool], go_on: Callable[[], object]) -> bool:
        """Take units now, or wait in the queue.

        :param address: see :func:`network`.
        :param is_wanted: called before the units are taken; a request that is no longer wanted takes none.
        :param go_on: called when the waiting request has taken its units.
        :returns: ``False`` if the request must wait.
        """
        # No request needs more than a full bucket.
        size = min(size, round(self._rate * BURST_S))
        if not self._lines:
            if self._takes(address, size, self._clock.mono()):
                return True
            self._clock.scheduler.callLater(LOOK_S, self._look)
        self._lines.setdefault(address, deque()).append(_Wait(size, is_wanted, go_on))
        return False

    def _takes(self, address: str, size: int, mono: float) -> bool:
        one = self._by_address.get(address) or self._full(self._rate)
        if not (one.has(size, mono) and self._all.has(size, mono)):
            return False
        one.level -= size
        self._all.level -= size
        self._by_address[address] = one
        if len(self._by_address) > MOST_ADDRESSES:
            self._forget(mono)
        return True

    def _forget(self, mono: float) -> None:
        # A full bucket equals no bucket. Buckets that are not full belong to the addresses of the last BURST_S seconds.
        self._by_address = {address: one for address, one in self._by_address.items() if not one.is_full(mono)}

    def _look(self) -> None:
        """Serve the addresses in turn, as long as there is room."""
        mono = self._clock.mono()
        try:
            while self._give_turns(mono):
                pass
        finally:
            if self._lines:
                self._clock.scheduler.callLater(LOOK_S, self._look)

    def _give_turns(self, mono: float) -> bool:
        """Serve each address once, and return whether one had room."""
        had_room = False
        for address in list(self._lines):
            # Stop if there is no room for a single unit: thousands of addresses may be waiting.
            if not self._all.has(1, mono):
                return False
            had_room |= self._give_turn(address, mono)
        return had_room

    def _give_turn(self, address: str, mono: float) -> bool:
        """Serve the first request of an address, if there is room; requests are served in order of arrival."""
        line = self._lines.pop(address)
        while line and not line[0].is_wanted():
            line.popleft()
        may_go = bool(line) and self._takes(address, line[0].size, mono)
        wait = line.popleft() if may_go else None
        if line:
            self._lines[address] = line
        if wait is not None:
            wait.go_on()
        return may_go


def peer_network(transport: Any) -> str:
    """Return the network to which the peer of a connection is counted."""
    return network(str(getattr(transport.getPeer(), "host", "")))


def network(host: str) -> str:
    """Return the network to which an address is counted; for IPv6 its first 64 bits: one machine may use the others."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a local socket
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
