"""When to look below the point from which a process scans an index of waiting rows.

The index keeps the entry of a finished row while any snapshot may see it, such as that of a pg_dump or a forgotten
psql. A scan from the beginning of the index therefore costs as much as all rows that finished since. Our scans start at
the first row that the previous scan found. Rows may appear below that point: a transaction that began earlier commits,
a ``due_at`` lies in the past, or a batch is released. A look back finds these rows. Its measured cost decides when the
next one comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from s2s.store.driver import Cursor

#: Seconds before its start point at which every scan begins: the usual delay of a commit. At 10,000 rows a second, this
#: makes a scan step over 2,000 dead rows, which takes half a millisecond.
SLACK_S: Final = 0.2
#: The least time between two look-backs: in seconds, and in multiples of their cost, so that they take at most a
#: twentieth of the time.
LEAST_S: Final = 0.25
SHARE: Final = 20
#: The most that one look-back can raise the measured cost: this many times the previous cost plus these seconds. Dead
#: rows accumulate gradually, while a database that stalls or is unavailable makes a single look-back slow, which does
#: not predict the next one.
GROWTH: Final = 4
GROWTH_S: Final = 0.005
#: Cost, in seconds, up to which a scan from the beginning is allowed when there is nothing else to do.
CHEAP_S: Final = 0.01
#: The statement timeout of a look-back, in seconds: enough for some 200 million dead rows.
LONGEST_S: Final = 60


class Lookback:
    """The schedule of one process's look-backs, and the result of the last one.

    :param now: returns monotonic seconds.
    :param least_s: the least seconds between two look-backs.
    :ivar behind: the ids found below the start point.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, least_s: float = LEAST_S) -> None:
        self._now = now
        self._least_s = least_s
        self._cost_s = 0.0
        self._next = float("-inf")
        self.behind: list[int] = []

    @property
    def is_due(self) -> bool:
        """Whether the next look-back may begin."""
        return self._now() >= self._next

    @property
    def is_cheap(self) -> bool:
        """Whether the last look-back cost so little that every scan may start at the beginning."""
        return self._cost_s <= CHEAP_S

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the cost of a look-back or of a scan from the beginning; meanwhile no look-back is due."""
        began, self._next = self._now(), float("inf")
        try:
            yield
        finally:
            self._cost_s = min(self._now() - began, GROWTH * self._cost_s + GROWTH_S)
            self._next = self._now() + max(self._least_s, SHARE * self._cost_s)

    def look(self, txn: Cursor, statement: str, params: Mapping[str, Any]) -> None:
        """Find the ids below the start point."""
        with self.measured():
            # Rolling back to the savepoint restores the previous timeout.
            txn.execute(f"savepoint lookback; set local statement_timeout = '{LONGEST_S}s'")
            txn.execute(statement, params)
            self.behind = [number for (number,) in txn]
            txn.execute("rollback to savepoint lookback")
