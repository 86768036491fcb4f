"""The window that bounds the bytes in flight to a peer (docs/protocol.rst, "Outbox and sweep")."""

from __future__ import annotations

from typing import Final


class CongestionWindow:
    """The number of bytes that may be in flight over one link: as many as are answered within a second.

    A peer that reads slowly does not refuse; the bytes pile up on the way, and every reply and health check waits
    behind them. So each reply is a measurement: the bytes ahead of it were transferred in the time that it took.

    :ivar bytes: the window; one frame always fits.
    """

    #: Enough for a full window of the smallest rows.
    START_BYTES: Final = 256 << 10
    LEAST_BYTES: Final = 64 << 10
    #: Half of the bytes that a link allows, so that a push never waits in the link's own queue.
    MOST_BYTES: Final = 2 << 20
    SLOW_S: Final = 1.0

    def __init__(self) -> None:
        self.bytes = self.START_BYTES

    def answered(self, took_s: float, ahead_bytes: int, size: int, is_tight: bool) -> None:
        """Adjust the window after a push was answered or given up.

        :param ahead_bytes: the bytes in flight when the push was sent, its own included.
        :param size: the size of the push in bytes.
        :param is_tight: other rows wait for the window.
        """
        if took_s > self.SLOW_S:
            self.bytes = max(self.LEAST_BYTES, min(self.bytes, int(ahead_bytes * self.SLOW_S / took_s)))
        elif is_tight:
            # Each reply adds the size of its push, so the window doubles with every round trip.
            self.bytes = min(self.MOST_BYTES, self.bytes + size)
