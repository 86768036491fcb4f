"""What links without a valid frame may cost: bytes, and lines of the log (docs/protocol.rst, "Strangers").

Whoever reaches the port may connect. Until a frame verifies, nothing tells a stranger from an engine, so the bytes of
both wait for their turn: the first few of each link apart from all others, since a health check is as short as that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from twisted.logger import Logger

from s2s.protocol.limits import Counters
from s2s.runtime.budget import Budget
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import LineQuota

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


class Strangers:
    """The links of one process that no valid frame has come over; :data:`s2s.link.factory.MAX_SILENT` bounds their
    number.
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
        """Ask for the right to take what was read from a link.

        :param address: see :func:`s2s.runtime.budget.network`.
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
        return self._lines.may_tell(why.partition(":")[0])

    def stop(self) -> None:
        """Tell what is counted now."""
        self._lines.stop()

    def _tell(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} {why}" for why, count in untold.items())
        self.log.warn(
            "{count} more connections ended without a valid frame: {told}", count=sum(untold.values()), told=told
        )


def weight(data: bytes) -> int:
    """Return as how many bytes a read counts."""
    dense = data.count(b"{") + data.count(b"[") + data.count(b":")
    return max(LEAST_BYTES, len(data) + DENSE_BYTES * dense)
