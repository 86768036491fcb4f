"""Turns for those whom nothing tells from an attacker yet: a rate for each address, and one for all."""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from s2s.runtime.clock import Clock

#: Seconds of a rate that may come at once.
BURST_S: Final = 2.0
#: Seconds between two looks at the line.
LOOK_S: Final = 0.05
#: Addresses that are remembered before those whose bucket is full again are forgotten, which are nearly all.
MOST_ADDRESSES: Final = 4096


@dataclass
class _Bucket:
    """Units that may be taken now; it fills with time."""

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
    """Units in a second, for each address and for all; what finds no room waits in a line of its address.

    The lines are as long as there are connections that may wait, which its user bounds.

    :param rates: units in a second of one address, and of all.
    """

    def __init__(self, rates: tuple[int, int], clock: Clock) -> None:
        self._clock = clock
        self._rate = rates[0]
        self._all = self._full(rates[1])
        self._by_address: dict[str, _Bucket] = {}
        #: The one that had its turn last stands last.
        self._lines: dict[str, deque[_Wait]] = {}

    def _full(self, rate: int) -> _Bucket:
        return _Bucket(rate, rate * BURST_S, self._clock.mono())

    def take(self, address: str, size: int, is_wanted: Callable[[], bool], go_on: Callable[[], object]) -> bool:
        """Take units now, or in turn.

        :param address: see :func:`network`.
        :param is_wanted: asked before a turn; what is not wanted any more takes nothing.
        :param go_on: called at its turn.
        :returns: ``False`` if it must wait.
        """
        # Nothing waits for more than a full bucket.
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
        # A full bucket says the same as none. Those that are not full are the addresses of the last BURST_S.
        self._by_address = {address: one for address, one in self._by_address.items() if not one.is_full(mono)}

    def _look(self) -> None:
        """Give each address one turn after the other, as long as there is room."""
        mono = self._clock.mono()
        try:
            while self._give_turns(mono):
                pass
        finally:
            if self._lines:
                self._clock.scheduler.callLater(LOOK_S, self._look)

    def _give_turns(self, mono: float) -> bool:
        """Give each address a turn, and return whether one had room."""
        had_room = False
        for address in list(self._lines):
            # Without room for the least the others are not looked at: there may be thousands of them.
            if not self._all.has(1, mono):
                return False
            had_room |= self._give_turn(address, mono)
        return had_room

    def _give_turn(self, address: str, mono: float) -> bool:
        """Let the first of one address go on, in the order in which they came, if there is room."""
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
    """Return by what the peer of a connection is counted."""
    return network(str(getattr(transport.getPeer(), "host", "")))


def network(host: str) -> str:
    """Return by what an address is counted: an IPv6 one by its first 64 bits, since one machine has all the others."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a local socket
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
