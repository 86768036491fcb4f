"""How many lines one kind of event may take: :mod:`s2s.runtime.line_quota`, :mod:`s2s.store.availability`."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.runtime.line_quota import MOST_CAUSES, PERIOD_S, TOLD, LineQuota
from s2s.store.availability import Availability


class LineQuotaTests(SynchronousTestCase):
    """:class:`LineQuota` with the clock of the test."""

    def setUp(self) -> None:
        """Keep what it adds up."""
        self.time = Clock()
        self.sums: list[Mapping[str, int]] = []
        self.quota = LineQuota(self.time, self.sums.append)

    def ask(self, count: int, cause: str = "a") -> int:
        """Ask for a line for each of some events, and return how many may have one."""
        return sum(self.quota.may_tell(cause) for _ in range(count))

    def test_a_few(self) -> None:
        """The first events of a period have a line each, and the others are added up at its end, by cause."""
        self.assertEqual(self.ask(TOLD + 4), TOLD)
        self.assertEqual(self.ask(2, "b"), 0)
        self.assertEqual(self.sums, [])
        self.time.advance(PERIOD_S)
        self.assertEqual(self.sums, [{"a": 4, "b": 2}])

    def test_a_line_for_many(self) -> None:
        """An event that stands for many is counted as many."""
        self.ask(TOLD)
        self.quota.may_tell("a", 7)
        self.quota.may_tell("a")
        self.time.advance(PERIOD_S)
        self.assertEqual(self.sums, [{"a": 8}])

    def test_lines_of_their_own_again(self) -> None:
        """Events have lines of their own again after a period in which nothing was added up."""
        self.ask(TOLD + 1)
        self.time.advance(PERIOD_S)
        self.assertEqual(self.ask(1), 0)
        self.time.advance(PERIOD_S)
        self.time.advance(PERIOD_S)
        self.assertEqual(self.sums, [{"a": 1}, {"a": 1}])
        self.assertEqual(self.ask(TOLD + 1), TOLD)

    def test_the_first_of_each_cause(self) -> None:
        """Where it is wanted, the first event of each cause has a line, whatever others have used up."""
        self.quota = LineQuota(self.time, self.sums.append, is_first_told=True)
        self.assertEqual(self.ask(TOLD + 5, "a"), TOLD)
        self.assertEqual([self.ask(1, "b"), self.ask(1, "b"), self.ask(1, "a")], [1, 0, 0])
        self.assertEqual(sum(self.ask(1, str(number)) for number in range(2 * MOST_CAUSES)), MOST_CAUSES - 2)

    def test_causes_are_bounded(self) -> None:
        """Causes beyond a bound are counted together."""
        self.ask(TOLD)
        for number in range(2 * MOST_CAUSES):
            self.ask(1, str(number))
        self.time.advance(PERIOD_S)
        [sums] = self.sums
        self.assertEqual(len(sums), MOST_CAUSES + 1)
        self.assertEqual(sum(sums.values()), 2 * MOST_CAUSES)

    def test_nothing_lasts(self) -> None:
        """No timer is left after a quiet period, nor after a stop, which adds up what is left."""
        self.ask(1)
        self.time.advance(PERIOD_S)
        self.assertEqual(self.time.getDelayedCalls(), [])
        self.ask(1)
        self.ask(TOLD)
        self.quota.stop()
        self.assertEqual(self.time.getDelayedCalls(), [])
        self.assertEqual(self.sums, [{"a": 1}])
        self.assertEqual(self.ask(TOLD + 1), TOLD + 1)
        self.assertEqual(self.time.getDelayedCalls(), [])


class AvailabilityTests(SynchronousTestCase):
    """:class:`Availability` with the clock of the test."""

    def setUp(self) -> None:
        """Make it."""
        self.time = Clock()
        self.availability = Availability(self.time)

    def lines(self, seconds: float, *errors: DatabaseUnavailable | None) -> list[str]:
        """Note some errors, let time pass, and return the lines that were logged."""
        with capturedLogs() as told:
            for error in errors:
                self.availability.note(error)
            self.time.advance(seconds)
        return [formatEvent(event) for event in told]

    def test_one_outage(self) -> None:
        """An outage is one line when it begins and one when it ends, however many notice it."""
        gone = DatabaseUnavailable("connection refused")
        told = self.lines(PERIOD_S, gone, gone, gone, None, None)
        self.assertEqual(told, ["the database is not available: connection refused", "the database is available again"])

    def test_a_cure(self) -> None:
        """An error that an operator can mend is told with its cure."""
        [line] = self.lines(0, DatabaseUnavailable("sorry, too many clients already", "53300"))
        self.assertIn("sorry, too many clients already: raise max_connections", line)

    def test_it_comes_and_goes(self) -> None:
        """A database that comes and goes takes a line a minute, with the last reason."""
        told = self.lines(PERIOD_S, *[DatabaseUnavailable("too many"), None] * 200)
        self.assertEqual(len(told), 2 * TOLD + 1)
        self.assertEqual(
            told[-1],
            f"the database is not available: {200 - TOLD} more times in 60 s, the last time: too many; it is there now",
        )

    def test_the_end_is_told(self) -> None:
        """The end of an outage is told where its beginning was, also by the line that counts."""
        self.lines(0, *[DatabaseUnavailable("too many"), None] * TOLD)
        self.assertEqual(self.lines(0, DatabaseUnavailable("too many"), None), [])
        self.assertEqual(self.lines(0, DatabaseUnavailable("too many")), [])
        self.assertEqual(len(self.lines(PERIOD_S)), 1)
        self.assertEqual(self.lines(0, None), ["the database is available again"])
