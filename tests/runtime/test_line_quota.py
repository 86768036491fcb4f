"""The limit of log lines for one kind of event: :mod:`s2s.runtime.line_quota`, :mod:`s2s.store.availability`."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.runtime.line_quota import MOST_CAUSES, PERIOD_S, TOLD, LineQuota
from s2s.store.availability import Availability


class LineQuotaTests(SynchronousTestCase):
    """:class:`LineQuota` with a fake clock."""

    def setUp(self) -> None:
        """Create a quota, and collect its summaries."""
        self.time = Clock()
        self.sums: list[Mapping[str, int]] = []
        self.quota = LineQuota(self.time, self.sums.append)

    def ask(self, count: int, cause: str = "a") -> int:
        """Ask for a line for each of ``count`` events, and return the number of allowed lines."""
        return sum(self.quota.may_tell(cause) for _ in range(count))

    def test_a_few(self) -> None:
        """The first events of a period have a line each; the others are counted by cause in a summary at its end."""
        self.assertEqual(self.ask(TOLD + 4), TOLD)
        self.assertEqual(self.ask(2, "b"), 0)
        self.assertEqual(self.sums, [])
        self.time.advance(PERIOD_S)
        self.assertEqual(self.sums, [{"a": 4, "b": 2}])

    def test_a_line_for_many(self) -> None:
        """An event with a count adds this count to the summary."""
        self.ask(TOLD)
        self.quota.may_tell("a", 7)
        self.quota.may_tell("a")
        self.time.advance(PERIOD_S)
        self.assertEqual(self.sums, [{"a": 8}])

    def test_lines_of_their_own_again(self) -> None:
        """Events have separate lines again after a period without a summary."""
        self.ask(TOLD + 1)
        self.time.advance(PERIOD_S)
        self.assertEqual(self.ask(1), 0)
        self.time.advance(PERIOD_S)
        self.time.advance(PERIOD_S)
        self.assertEqual(self.sums, [{"a": 1}, {"a": 1}])
        self.assertEqual(self.ask(TOLD + 1), TOLD)

    def test_the_first_of_each_cause(self) -> None:
        """With ``is_first_told`` the first event of each cause has a line, even if the quota is used up."""
        self.quota = LineQuota(self.time, self.sums.append, is_first_told=True)
        self.assertEqual(self.ask(TOLD + 5, "a"), TOLD)
        self.assertEqual([self.ask(1, "b"), self.ask(1, "b"), self.ask(1, "a")], [1, 0, 0])
        self.assertEqual(sum(self.ask(1, str(number)) for number in range(2 * MOST_CAUSES)), MOST_CAUSES - 2)

    def test_causes_are_bounded(self) -> None:
        """Causes over the limit are counted together."""
        self.ask(TOLD)
        for number in range(2 * MOST_CAUSES):
            self.ask(1, str(number))
        self.time.advance(PERIOD_S)
        [sums] = self.sums
        self.assertEqual(len(sums), MOST_CAUSES + 1)
        self.assertEqual(sum(sums.values()), 2 * MOST_CAUSES)

    def test_nothing_lasts(self) -> None:
        """No timer is left after a quiet period, or after a stop, which reports the remaining counts."""
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
    """:class:`Availability` with a fake clock."""

    def setUp(self) -> None:
        """Create the availability."""
        self.time = Clock()
        self.availability = Availability(self.time)

    def lines(self, seconds: float, *errors: DatabaseUnavailable | None) -> list[str]:
        """Note errors, advance the clock, and return the lines that were logged."""
        with capturedLogs() as told:
            for error in errors:
                self.availability.note(error)
            self.time.advance(seconds)
        return [formatEvent(event) for event in told]

    def test_one_outage(self) -> None:
        """An outage causes one line at its beginning and one at its end, however many callers report it."""
        gone = DatabaseUnavailable("connection refused")
        told = self.lines(PERIOD_S, gone, gone, gone, None, None)
        self.assertEqual(told, ["the database is not available: connection refused", "the database is available again"])

    def test_a_cure(self) -> None:
        """An error that an operator can correct is logged with its cure."""
        [line] = self.lines(0, DatabaseUnavailable("sorry, too many clients already", "53300"))
        self.assertIn("sorry, too many clients already: raise max_connections", line)

    def test_it_comes_and_goes(self) -> None:
        """A database that fails and recovers repeatedly causes one summary a minute, with the last reason."""
        told = self.lines(PERIOD_S, *[DatabaseUnavailable("too many"), None] * 200)
        self.assertEqual(len(told), 2 * TOLD + 1)
        self.assertEqual(
            told[-1],
            f"the database is not available: {200 - TOLD} more times in 60 s, the last time: too many; it is there now",
        )

    def test_the_end_is_told(self) -> None:
        """The end of an outage is logged if its beginning was logged, by a line or in a summary."""
        self.lines(0, *[DatabaseUnavailable("too many"), None] * TOLD)
        self.assertEqual(self.lines(0, DatabaseUnavailable("too many"), None), [])
        self.assertEqual(self.lines(0, DatabaseUnavailable("too many")), [])
        self.assertEqual(len(self.lines(PERIOD_S)), 1)
        self.assertEqual(self.lines(0, None), ["the database is available again"])
