"""Bounds on the bytes and log lines of links without a valid frame (docs/protocol.rst, "Strangers").

Any host that reaches the port may connect. Until a frame is verified, a stranger cannot be distinguished from an
engine, so the bytes of both wait for their turn. The first bytes of each link have a separate budget, which is enough
for a health check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from twisted.logger import Logger

from s2s.protocol.limits import Counters
from s2s.runtime.budget import Budget
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import LineQuota

#: The number of bytes at the start of a link that count as first bytes: a challenge and an answer to ours fit.
FIRST_BYTES: Final = 1024
#: The minimum bytes that one read counts as, because reading one byte costs about as much as processing 512 bytes.
LEAST_BYTES: Final = 512
#: The bytes that each object, list or member adds to that count, because it takes as long to parse.
DENSE_BYTES: Final = 8
#: Maximum first bytes a second: of one address, and of all addresses.
FIRST_RATE: Final = (256 << 10, 1 << 20)
#: Maximum other bytes a second: of one address, and of all addresses. 64 KiB take about 1 ms of the reactor's time, so
#: the rate of all addresses bounds their cost to about 1 % of a core.
RATE: Final = (128 << 10, 512 << 10)


class Strangers:
    """The budgets of a process's links without a valid frame.

    :data:`s2s.link.factory.MAX_SILENT` bounds the number of these links.
    """

    log = Logger()

    def __init__(self, clock: Clock, counters: Counters) -> None:
        self._clock = clock
        self._counters = counters
        self._first = Budget(FIRST_RATE, clock)
        self._rest = Budget(RATE, clock)
        self._lines = LineQuota(clock.scheduler, self._tell)

    def may_take(
        self, address: str, before: int, data: bytes, is_wanted: Callable[[], bool], go_on: Callable[[], object]
    ) -> bool:
        """Return whether the link may process a chunk now; otherwise queue ``go_on`` for the chunk's turn.

        :param address: see :func:`s2s.runtime.budget.network`.
        :param before: the number of bytes read from this link before the chunk.
        :param data: the chunk.
        :param is_wanted: called at the chunk's turn; returns whether the link still exists.
        :param go_on: called at the chunk's turn.
        :returns: ``False`` if the chunk must wait for its turn.
        """
        budget = self._first if before + len(data) <= FIRST_BYTES else self._rest
        may_take = budget.take(address, weight(data), is_wanted, go_on)
        if not may_take:
            self._counters.meet("strangers")
        return may_take

    def may_tell(self, why: str) -> bool:
        """Return whether the log may have a line about a link's end.

        A few ends have a line each; the others share one line a minute.

        :param why: the reason; ends are counted by its text up to the first colon.
        """
        return self._lines.may_tell(why.partition(":")[0])

    def stop(self) -> None:
        """Log the present counts."""
        self._lines.stop()

    def _tell(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} {why}" for why, count in untold.items())
        self.log.warn(
            "{count} more connections ended without a valid frame: {told}", count=sum(untold.values()), told=told
        )


def weight(data: bytes) -> int:
    """Return the number of bytes that a read counts as."""
    dense = data.count(b"{") + data.count(b"[") + data.count(b":")
    return max(LEAST_BYTES, len(data) + DENSE_BYTES * dense)
