"""Write rows one by one, after the database refused an unknown one of them or another session holds one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

import psycopg2

from s2s.errors import DatabaseError, DatabaseUnavailable, StatementRefused
from s2s.store.driver import Cursor, refusable, translate_error

R = TypeVar("R")
T = TypeVar("T")

#: Per row: the lock timeout and the statement timeout, in milliseconds. After this many timeouts, a lock waits 1 ms
#: only.
_LOCK_MS: Final = 200
_ROW_MS: Final = 1000
_MOST_WAITS: Final = 5
#: Seconds after which no further row is started.
LONGEST_S: Final = 4.0
#: Another session holds the row, or a trigger takes too long.
HELD: Final = (psycopg2.errors.LockNotAvailable, psycopg2.errors.QueryCanceled)


def singly(txn: Cursor, rows: Iterable[R], write: Callable[[R], T]) -> Iterator[T | DatabaseError]:
    """Write each row in a savepoint of its own, with short timeouts that apply until the transaction ends.

    :param write: writes one row in the transaction.
    :returns: for each row its result, the :class:`StatementRefused`, or a :class:`DatabaseUnavailable` if another
        session holds the row or the time is up.
    """
    # A deferred constraint trigger would refuse the COMMIT, and thus all rows.
    txn.execute(
        f"set constraints all immediate; set local lock_timeout = {_LOCK_MS}; set local statement_timeout = {_ROW_MS}"
    )
    until = time.monotonic() + LONGEST_S
    waits = 0
    for row in rows:
        if time.monotonic() >= until:
            yield DatabaseUnavailable("the row was not tried: earlier rows of its batch used up the time limit")
            continue
        try:
            with refusable(txn):
                written = write(row)
        except StatementRefused as refused:
            yield refused
        except HELD as error:
            yield translate_error(error, txn.connection)
            waits += 1
            if waits == _MOST_WAITS:
                txn.execute("set local lock_timeout = 1")
        else:
            yield written
