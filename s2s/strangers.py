"""What links without a valid frame may cost: bytes, and lines of the log (docs/protocol.rst, "Strangers").

Whoever reaches the port may connect. Until a frame verifies, nothing tells a stranger from an engine, so the bytes of
both wait for their turn: the first few of each link apart from all others, since a health check is as short as that.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from twisted.logger import Logger

from s2s.clock import Clock
from s2s.limits import Counters

#: Bytes of a link that count as its first ones: a challenge and an answer to ours fit.
FIRST_BYTES: Final = 1024
#: The least number of bytes that a read counts as, because reading one byte costs about as much as judging 512.
LEAST_BYTES: Final = 512
#: The bytes that an object, a list or a member adds to that count: it takes as long to parse.
DENSE_BYTES: Final = 8
#: First bytes in a second: of one address, and of all.
FIRST_RATE: Final = (256 << 10, 1 << 20)
#: All other bytes in a second: of one address, and of all. 64 KiB of them take about 1 ms of the reactor's time, so the
#: second rate bounds that to some 1 % of a core.
RATE: Final = (128 << 10, 512 << 10)
#: Seconds of a rate that may come at once.
BURST_S: Final = 2.0
#: Seconds between two looks at the links that wait.
LOOK_S: Final = 0.05
#: Addresses that are remembered before those whose bucket is full again are forgotten, which are nearly all.
MOST_ADDRESSES: Final = 4096
#: Ends of links that are told one by one in a period, and the period in seconds; further ones are one line.
TOLD: Final = 3
PERIOD_S: Final = 60.0


@dataclass
class _Bucket:
    """Bytes that may be read now; it fills with time."""

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
    address: str
    size: int
    is_wanted: Callable[[], bool]
    go_on: Callable[[], object]


class _Budget:
    """Bytes in a second, for each address and for all; what finds no room waits in line.

    The line is as long as there are links without a valid frame, see :data:`s2s.links.MAX_SILENT`.
    """

    def __init__(self, rates: tuple[int, int], clock: Clock) -> None:
        self._clock = clock
        self._rate = rates[0]
        self._all = self._full(rates[1])
        self._by_address: dict[str, _Bucket] = {}
        self._line: list[_Wait] = []

    def _full(self, rate: int) -> _Bucket:
        return _Bucket(rate, rate * BURST_S, self._clock.mono())

    def take(self, address: str, size: int, is_wanted: Callable[[], bool], go_on: Callable[[], object]) -> bool:
        """Take bytes now, or in turn.

        :param is_wanted: asked before a turn; what is not wanted any more takes nothing.
        :param go_on: called at its turn.
        :returns: ``False`` if it must wait.
        """
        mono = self._clock.mono()
        # No read waits for more than a full bucket.
        size = min(size, round(self._rate * BURST_S))
        if not self._line:
            if self._takes(address, size, mono):
                return True
            self._clock.scheduler.callLater(LOOK_S, self._look)
        self._line.append(_Wait(address, size, is_wanted, go_on))
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
        mono = self._clock.mono()
        line, self._line = [wait for wait in self._line if wait.is_wanted()], []
        held: set[str] = set()
        for wait in line:
            # An address that has used up its own holds up itself alone, and in its own order.
            if wait.address not in held and self._takes(wait.address, wait.size, mono):
                wait.go_on()
            else:
                held.add(wait.address)
                self._line.append(wait)
        if self._line:
            self._clock.scheduler.callLater(LOOK_S, self._look)


class Strangers:
    """The links of one process that no valid frame has come over."""

    log = Logger()

    def __init__(self, clock: Clock, counters: Counters) -> None:
        self._clock = clock
        self._counters = counters
        self._first = _Budget(FIRST_RATE, clock)
        self._rest = _Budget(RATE, clock)
        self._told = 0
        self._untold: Counter[str] = Counter()
        self._is_counting = False

    def may_take(
        self, address: str, before: int, data: bytes, is_wanted: Callable[[], bool], go_on: Callable[[], object]
    ) -> bool:
        """Ask for the right to take what was read from a link.

        :param address: see :func:`network`.
        :param before: bytes that were read from this link before these.
        :param data: what was read.
        :param is_wanted: asked at its turn: whether the link is still there.
        :param go_on: called at its turn.
        :returns: ``False`` if it must wait for its turn.
        """
        budget = self._first if before + len(data) <= FIRST_BYTES else self._rest
        may_take = budget.take(address, weight(data), is_wanted, go_on)
        if not may_take:
            self._counters.meet("strangers")
        return may_take

    def may_tell(self, why: str) -> bool:
        """Ask for a line of the log about a link's end: a few have one each, all others share one a minute.

        :param why: what is counted, up to its first colon.
        """
        if not self._is_counting:
            self._is_counting = True
            self._clock.scheduler.callLater(PERIOD_S, self._tell)
        if self._told < TOLD:
            self._told += 1
            return True
        self._untold[why.partition(":")[0]] += 1
        return False

    def _tell(self) -> None:
        self._is_counting = False
        if not self._untold:
            self._told = 0
            return
        told = ", ".join(f"{count} {why}" for why, count in self._untold.most_common())
        self.log.warn(
            "{count} more connections ended without a valid frame: {told}", count=sum(self._untold.values()), told=told
        )
        self._untold.clear()
        # Line by line again only after a minute in which there was nothing to add up.
        self._is_counting = True
        self._clock.scheduler.callLater(PERIOD_S, self._tell)


def weight(data: bytes) -> int:
    """Return as how many bytes a read counts."""
    dense = data.count(b"{") + data.count(b"[") + data.count(b":")
    return max(LEAST_BYTES, len(data) + DENSE_BYTES * dense)


def network(host: str) -> str:
    """Return by what an address is counted: an IPv6 one by its first 64 bits, since one machine has all the others."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a local socket
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
