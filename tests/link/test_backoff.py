"""The pause before the next attempt to connect, in two classes."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.link.backoff import Backoff


def _pauses(backoff: Backoff, count: int) -> list[float]:
    return [backoff(at) for at in range(count)]


class BackoffTests(SynchronousTestCase):
    """:class:`Backoff`."""

    def make(self, rng: Callable[[], float] = lambda: 1.0) -> Backoff:
        """Return a backoff that draws the given numbers."""
        return Backoff(rng)

    def test_fast(self) -> None:
        """The bound starts at 100 ms and doubles up to 5 s, and the pause is drawn between 0 and the bound."""
        self.assertEqual(_pauses(self.make(), 8), [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
        self.assertEqual(_pauses(self.make(lambda: 0.0), 3), [0.0, 0.0, 0.0])
        self.assertEqual(_pauses(self.make(lambda: 0.5), 2), [0.05, 0.1])

    def test_slow(self) -> None:
        """After a refusal a pause is at least 5 s, the first is drawn up to 10 s, and the bound grows up to 60 s."""
        for drawn, expected in ((1.0, [10.0, 20.0, 40.0, 60.0, 60.0, 60.0]), (0.0, [5.0] * 6)):
            backoff = self.make(lambda drawn=drawn: drawn)
            backoff.refused()
            self.assertEqual(_pauses(backoff, 6), expected)

    def test_refused_again_and_again(self) -> None:
        """A refusal after each attempt does not reset the number of attempts."""
        backoff = self.make()
        pauses = []
        for at in range(5):
            backoff.refused()
            pauses.append(backoff(at))
        self.assertEqual(pauses, [10.0, 20.0, 40.0, 60.0, 60.0])

    def test_refused_after_long_tries(self) -> None:
        """A first refusal after many fast attempts starts the slow class from its first pause."""
        backoff = self.make()
        _pauses(backoff, 20)
        backoff.refused()
        self.assertEqual(backoff(0), 10.0)

    def test_only_a_proof_starts_again(self) -> None:
        """The attempts that ClientService counts have no effect; a proof resets the pause in either class."""
        backoff = self.make()
        self.assertEqual([backoff(0), backoff(0), backoff(0)], [0.1, 0.2, 0.4])
        backoff.proven()
        self.assertEqual(backoff(7), 0.1)
        backoff.refused()
        backoff(0)
        backoff.proven()
        self.assertEqual(backoff(0), 0.1)

    def test_dismissed_again_and_again(self) -> None:
        """Each proven link that the server refuses makes the next pause longer, until one lasts for two minutes."""
        backoff = self.make()
        pauses = []
        for lasted in (900.0, 0.1, 7.0, 60.0, 60.0, 120.0, 60.0):
            backoff.proven()
            backoff.dismissed(lasted)
            pauses.append(backoff(0))
        self.assertEqual(pauses, [10.0, 20.0, 40.0, 60.0, 60.0, 10.0, 20.0])
        backoff.proven()
        self.assertEqual(backoff(0), 0.1)

    def test_never_given_up(self) -> None:
        """After ten thousand attempts the pause still has its maximum, and no number overflows."""
        backoff = self.make()
        self.assertEqual(_pauses(backoff, 10_000)[-1], 5.0)

    @settings(max_examples=100)
    @given(st.lists(st.sampled_from(["refused", "proven", "try"]), max_size=40), st.randoms(use_true_random=False))
    def test_bounds(self, happens: list[str], rng: object) -> None:
        """For any order of events a fast pause is between 0 and 5 s and a slow pause between 5 and 60 s."""
        backoff, is_slow = Backoff(rng.random), False  # type: ignore[attr-defined]
        for each in happens:
            if each == "try":
                pause = backoff(0)
                self.assertTrue(5 <= pause <= 60 if is_slow else 0 <= pause <= 5)
            else:
                getattr(backoff, each)()
                is_slow = each == "refused"

    def test_spread(self) -> None:
        """Pauses are random, so that a thousand engines do not reconnect at the same time."""
        backoffs = [Backoff() for _ in range(50)]
        self.assertGreater(len({backoff(0) for backoff in backoffs}), 45)
