"""When to look below the point from which a process reads an index of waiting rows.

A row that is over stays in its index while any snapshot may see it: a pg_dump, a forgotten psql. So a look that starts
at the beginning of the index costs as much as all that has run since. Our looks start at the first row that the last
one found. Rows may appear below that point: a transaction that began earlier commits, a ``due_at`` lies in the past, a
batch is given back. A look back finds them. Its cost is measured and decides when the next one comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from s2s.store.driver import Cursor

#: Seconds that every look starts before its point: the usual delay of a commit. A look of 10,000 rows a second steps
#: over 2,000 dead rows for it, in half a millisecond.
SLACK_S: Final = 0.2
#: Seconds between two looks back, at least, and in multiples of their cost: they take a twentieth of the time at most.
LEAST_S: Final = 0.25
SHARE: Final = 20
#: A look that takes longer than before counts as this many times the last one and these seconds at most: dead rows come
#: gradually, while a database that stands still, or is away, makes one look long and says nothing of the next.
GROWTH: Final = 4
GROWTH_S: Final = 0.005
#: Seconds that a look from the beginning may cost where nothing else is to be done.
CHEAP_S: Final = 0.01
#: Seconds that the database may take for a look back: some 200 million dead rows.
LONGEST_S: Final = 60


class Lookback:
    """The schedule of one process's looks back, and what the last one found.

    :param now: monotonic seconds.
    :param least_s: seconds between two, at least.
    :ivar behind: ids found below the point.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, least_s: float = LEAST_S) -> None:
        self._now = now
        self._least_s = least_s
        self._cost_s = 0.0
        self._next = float("-inf")
        self.behind: list[int] = []

    @property
    def is_due(self) -> bool:
        """Whether the next one may begin."""
        return self._now() >= self._next

    @property
    def is_cheap(self) -> bool:
        """Whether the last one cost next to nothing, so that every look may start at the beginning."""
        return self._cost_s <= CHEAP_S

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure what a look back, or a look from the beginning, costs; meanwhile none is due."""
        began, self._next = self._now(), float("inf")
        try:
            yield
        finally:
            self._cost_s = min(self._now() - began, GROWTH * self._cost_s + GROWTH_S)
            self._next = self._now() + max(self._least_s, SHARE * self._cost_s)

    def look(self, txn: Cursor, statement: str, params: Mapping[str, Any]) -> None:
        """Find the ids below the point."""
        with self.measured():
            # The savepoint gives the timeout its value back.
            txn.execute(f"savepoint lookback; set local statement_timeout = '{LONGEST_S}s'")
            txn.execute(statement, params)
            self.behind = [number for (number,) in txn]
            txn.execute("rollback to savepoint lookback")
