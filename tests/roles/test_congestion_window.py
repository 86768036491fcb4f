"""The window that bounds the bytes in flight to a peer."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from s2s.protocol.limits import Bounds, Timing
from s2s.roles.engine.congestion_window import CongestionWindow
from s2s.roles.engine.relay import PUSH_S


class CongestionWindowTests(SynchronousTestCase):
    """:class:`CongestionWindow`, against links of a steady rate."""

    def run_link(self, pace: CongestionWindow, rate: int, size: int, seconds: float) -> tuple[float, float]:
        """Keep a link that carries ``rate`` bytes a second as full as the window allows.

        :returns: the longest time of a push in the second half, and the share of the rate that was used then.
        """
        now, carried, worst, used = 0.0, 0.0, 0.0, 0
        flying: list[tuple[float, float, int]] = []  # time of sending, time of the reply, bytes ahead
        while now < seconds:
            while not flying or (len(flying) + 1) * size <= pace.bytes:
                carried = max(carried, now) + size / rate
                flying.append((now, carried, (len(flying) + 1) * size))
            sent_at, now, ahead = flying.pop(0)
            pace.answered(now - sent_at, ahead, size, is_tight=True)
            if now > seconds / 2:
                worst, used = max(worst, now - sent_at), used + size
        return worst, used / (rate * seconds / 2)

    def test_steady_rates(self) -> None:
        """From 100 KB/s on a push takes about two seconds at most, and the link is fully used."""
        for rate in (100_000, 300_000, 1_000_000):
            for size in (600, 16_000, 60_000):
                with self.subTest(rate=rate, size=size):
                    worst, used = self.run_link(CongestionWindow(), rate, size, 60.0)
                    self.assertLess(worst, 2.5)
                    self.assertGreater(used, 0.9)

    def test_a_rate_that_falls(self) -> None:
        """One slow reply shows the new rate: the window is right at once, and not halved step by step."""
        pace = CongestionWindow()
        self.run_link(pace, 100_000_000, 16_000, 1.0)
        self.assertGreater(pace.bytes, CongestionWindow.MOST_BYTES - 16_000)
        pace.answered(2.0, 400_000, 16_000, is_tight=True)
        self.assertEqual(pace.bytes, 200_000)

    def test_bounds(self) -> None:
        """The window grows only while rows wait for it, never beyond 2 MiB, and shrinks to one frame at the least."""
        pace = CongestionWindow()
        for _ in range(100):
            pace.answered(0.001, 60_000, 60_000, is_tight=False)
        self.assertEqual(pace.bytes, CongestionWindow.START_BYTES)
        pace.answered(20.0, 60_000, 60_000, is_tight=False)
        self.assertEqual(pace.bytes, Bounds.frame_size)
        for _ in range(100):
            pace.answered(0.001, 60_000, 60_000, is_tight=True)
        self.assertEqual(pace.bytes, CongestionWindow.MOST_BYTES)

    def test_deadline(self) -> None:
        """The deadline of a push is the time that a frame may take to arrive, plus that of the reply."""
        self.assertEqual(PUSH_S, Timing.frame + Timing.respond)
