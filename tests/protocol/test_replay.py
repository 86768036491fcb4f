"""The replay cache keeps every entry for two windows and removes none early."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import Overloaded, Replay
from s2s.protocol.replay import CAPACITY, ReplayCache

_W = 300.0


class ReplayCacheTests(SynchronousTestCase):
    """:class:`ReplayCache`."""

    def test_seen_before(self) -> None:
        """The same pair is refused; the same id under another key is another request."""
        cache = ReplayCache(0.0, _W)
        cache.enter("k1", "a", 0.0)
        self.assertRaises(Replay, cache.enter, "k1", "a", 1.0)
        cache.enter("k2", "a", 1.0)
        cache.enter("k1", "b", 1.0)
        self.assertEqual(len(cache), 3)

    def test_kept_while_it_could_be_fresh(self) -> None:
        """A request dated a window ahead is refused until two windows later, and one second after that too."""
        for entered in (0.0, 0.5, 300.0, 599.0, 599.999, 600.0, 601.0, 1000.0):
            for age in (1.0, 299.0, 300.0, 301.0, 599.0, 600.0):
                cache = ReplayCache(0.0, _W)
                cache.enter("k", "a", entered)
                with self.subTest(entered=entered, age=age):
                    self.assertRaises(Replay, cache.enter, "k", "a", entered + age)

    def test_forgotten_in_the_end(self) -> None:
        """After six windows and a little more an entry is gone, whether other requests came in between or not."""
        for between in ([], [600.0], [600.0, 1199.0], [650.0, 700.0]):
            cache = ReplayCache(0.0, _W)
            cache.enter("k", "a", 0.0)
            for at in between:
                cache.enter("k", f"b{at}", at)
            cache.enter("k", "c", 2000.0)
            cache.enter("k", "a", 2000.0)

    def test_two_generations(self) -> None:
        """An entry survives the first change of generations and goes with the second."""
        cache = ReplayCache(0.0, _W)
        cache.enter("k", "a", 10.0)
        cache.enter("k", "b", 605.0)
        self.assertEqual(len(cache), 2)
        cache.enter("k", "c", 1215.0)
        self.assertEqual(len(cache), 2)
        self.assertRaises(Replay, cache.enter, "k", "b", 1215.0)

    @settings(max_examples=300)
    @given(st.lists(st.tuples(st.floats(0, 700), st.integers(0, 5)), max_size=30))
    def test_never_early(self, steps: list[tuple[float, int]]) -> None:
        """Whatever requests come at any rate, no entry goes within two windows, and none stays for ever."""
        cache, now, seen = ReplayCache(0.0, _W), 0.0, dict[int, float]()
        for pause, number in steps:
            now += pause
            try:
                cache.enter("k", str(number), now)
            except Replay:
                self.assertLess(now - seen[number], 4 * _W + 700)
            else:
                self.assertGreater(now - seen.get(number, -1e9), 2 * _W)
                seen[number] = now

    def test_no_resize_makes_a_replay_fresh(self) -> None:
        """However the window changes, a seen request that is still fresh is refused, also at the window's edges."""
        for seed in range(1500):
            rng = random.Random(seed)
            cache = ReplayCache(0.0, rng.choice((5, 30, 300, 900)))
            first = rng.uniform(0, 1000)
            steps = [(rng.uniform(0, 1500), "enter") for _ in range(6)]
            steps += [(first + rng.uniform(0, 10 if seed % 2 else 1500), "resize") for _ in range(rng.randint(0, 5))]
            steps += [(rng.uniform(0, 4000), "other") for _ in range(20)]
            steps += [(rng.uniform(0, 3000), "replay") for _ in range(40)]
            seen: list[tuple[str, float]] = []
            for at, step in sorted(steps):
                window = int(cache.window(at))
                if step == "resize":
                    cache.resize(rng.choice((5, 6, 10, 30, 100, 300, 900)), at)
                elif step == "other":
                    cache.enter("other", str(at), at)
                elif step == "enter":
                    cache.enter("k", str(at), at)
                    seen.append((str(at), int(at) + rng.choice((window, -window, rng.randint(-window, window)))))
                else:
                    for number, ts in seen:
                        if abs(int(at) - ts) <= window:
                            self.assertRaises(Replay, cache.enter, "k", number, at)

    def test_the_first_resize(self) -> None:
        """A cache that has held nothing changes its window at once; a used one widens it by one second each second."""
        cache = ReplayCache(0.0, 300)
        cache.resize(900, 0.0)
        self.assertEqual(cache.window(0.0), 900)
        cache.enter("k", "a", 1.0)
        cache.resize(100, 10.0)
        self.assertEqual(cache.window(10.0), 100)
        cache.resize(300, 20.0)
        self.assertEqual([cache.window(at) for at in (20.0, 120.0, 220.0, 999.0)], [100, 200, 300, 300])

    def test_a_flood_pushes_nothing_out(self) -> None:
        """A request of a key without room is overloaded with the time to wait, and requests seen before stay seen."""
        cache = ReplayCache(0.0, _W, capacity=20)
        for number in range(10):
            cache.enter("k", str(number), 1.0)
        error = self.assertRaises(Overloaded, cache.enter, "k", "new", 100.0)
        self.assertEqual(error.details["limit"], 10)
        self.assertIn(error.details["retry_after_ms"], range(500_000, 502_001))
        self.assertFalse(error.closes)
        for number in range(10):
            self.assertRaises(Replay, cache.enter, "k", str(number), 101.0)
        # The old generation counts too, until it is dropped.
        self.assertRaises(Overloaded, cache.enter, "k", "new", 700.0)
        self.assertRaises(Replay, cache.enter, "k", "0", 1199.0)
        cache.enter("k", "new", 1310.0)

    def test_one_key_leaves_room_to_others(self) -> None:
        """Keys that flood the cache one after the other are refused by name, and a further key is not."""
        refused: list[str] = []
        cache = ReplayCache(0.0, _W, capacity=1000, on_full=refused.append)
        for key_id, most in (("k1", 500), ("k2", 250), ("k3", 125)):
            for number in range(most):
                cache.enter(key_id, str(number), 1.0)
            self.assertRaises(Overloaded, cache.enter, key_id, "new", 1.0)
        for number in range(60):
            cache.enter("engine", str(number), 650.0)
        self.assertEqual(refused, ["k1", "k2", "k3"])
        self.assertRaises(Replay, cache.enter, "k1", "0", 700.0)
        self.assertEqual(len(cache), 935)
        cache.enter("k1", "0", 1300.0)
        self.assertEqual(len(cache), 61)

    def test_refused_ones_are_not_entered(self) -> None:
        """A request that was refused as overloaded is accepted later under the same id."""
        cache = ReplayCache(0.0, _W, capacity=1)
        cache.enter("k", "a", 0.0)
        self.assertRaises(Overloaded, cache.enter, "k", "b", 0.0)
        cache.enter("k", "b", 1250.0)

    def test_the_wait_is_never_nothing(self) -> None:
        """The pause is at least one millisecond up to the moment when the generations change."""
        cache = ReplayCache(0.0, _W, capacity=0)
        for at in (599.9999, 600.0, 600.9999):
            error = self.assertRaises(Overloaded, cache.enter, "k", "a", at)
            self.assertGreaterEqual(error.details["retry_after_ms"], 1)

    def test_capacity(self) -> None:
        """A process remembers a million requests."""
        self.assertEqual(CAPACITY, 1_000_000)
