"""How fast a peer is fed (docs/protocol.rst, "Outbox and sweep")."""

from __future__ import annotations

from typing import Final


class CongestionWindow:
    """How many bytes may fly over one link: as many as are answered within a second.

    A peer that reads slowly does not refuse; the bytes pile up on the way, and every answer and health check waits
    behind them. So each answer is a measurement: what lay ahead of it was carried in the time that it took.

    :ivar bytes: the window; one frame always fits.
    """

    #: A full window of the smallest rows.
    START_BYTES: Final = 256 << 10
    LEAST_BYTES: Final = 64 << 10
    #: Half of what a link allows, so that a push never waits in the link's own line.
    MOST_BYTES: Final = 2 << 20
    SLOW_S: Final = 1.0

    def __init__(self) -> None:
        self.bytes = self.START_BYTES

    def answered(self, took_s: float, ahead_bytes: int, size: int, is_tight: bool) -> None:
        """A push was answered, or is given up.

        :param ahead_bytes: what flew when it was sent, itself included.
        :param size: its own, in bytes.
        :param is_tight: other rows wait for the window.
        """
        if took_s > self.SLOW_S:
            self.bytes = max(self.LEAST_BYTES, min(self.bytes, int(ahead_bytes * self.SLOW_S / took_s)))
        elif is_tight:
            # By each answer once: it doubles with every round trip.
            self.bytes = min(self.MOST_BYTES, self.bytes + size)
