"""Waiting for locks without holding anybody up for long, and naming the sessions that hold them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import psycopg2
from psycopg2.errors import DeadlockDetected, LockNotAvailable

from s2s.errors import OperatorError, harmless
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Connection, Cursor, commit

T = TypeVar("T")

#: Seconds that one try waits for a lock. Statements of others queue behind it meanwhile.
TRY_S: Final = 1.0
#: Seconds between two tries, in which the statements of others run.
PAUSE_S: Final = 2.0
#: Seconds of all tries together, where the caller says nothing.
PATIENCE_S: Final = 300.0
#: Seconds between two looks at the sessions that block us; less than TRY_S, or a look would never find us waiting.
_LOOK_S: Final = 0.2
_SHOWN: Final = 5
#: The pid 0 stands for a prepared transaction.
_BLOCKERS: Final = """
select blocker.pid, session.application_name, session.state,
       extract(epoch from clock_timestamp() - session.xact_start)::bigint
from (select distinct unnest(pg_blocking_pids(%s)) as pid) blocker left join pg_stat_activity session using (pid)
order by session.xact_start limit %s
"""


class LockWait:
    """Runs transactions that need locks, again and again until they get them or the patience is over.

    :param conn: an open connection, not in autocommit.
    :param tell: called with a line, in another thread, when other sessions block us than before.
    :param patience_s: seconds of all waiting.
    """

    def __init__(self, conn: Connection, tell: Callable[[str], object], patience_s: float) -> None:
        self._conn = conn
        self._tell = tell
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._over = threading.Event()
        self._blockers = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look, on a connection of its own, for the sessions that block us."""
        info = self._conn.info
        beside = {**info.dsn_parameters, "password": info.password}
        watcher = threading.Thread(target=self._watch, args=(beside, info.backend_pid), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()

    def run(self, work: Callable[[Cursor], T]) -> T:
        """Do some work in a transaction, and commit it.

        :raises OperatorError: the locks were not free in time; the text names the sessions that hold them.
        """
        is_first = True
        while True:
            try:
                with self._conn.cursor(cursor_factory=StoreCursor) as txn:
                    txn.execute("set local statement_timeout = 0; set local lock_timeout = %s", (round(TRY_S * 1000),))
                    result = work(txn)
                commit(self._conn)
                return result
            except (LockNotAvailable, DeadlockDetected):
                self._conn.rollback()
            # One try may end before the watcher has found the sessions to name.
            if not is_first and time.monotonic() >= self._deadline:
                raise OperatorError(
                    f"the locks were not free within {self._patience_s:g} s"
                    f"{f': {self._blockers}' if self._blockers else ''}: try again when the others are done"
                )
            is_first = False
            time.sleep(PAUSE_S)

    def _watch(self, beside: dict[str, Any], pid: int) -> None:
        conn: Connection | None = None
        told: frozenset[int] = frozenset()
        with suppress(psycopg2.Error):  # without a connection to spare nothing is named
            try:
                while not self._over.wait(_LOOK_S):
                    if conn is None:
                        conn = psycopg2.connect(**beside)
                        conn.autocommit = True
                    with conn.cursor(cursor_factory=StoreCursor) as txn:
                        txn.execute(_BLOCKERS, (pid, _SHOWN))
                        rows = txn.fetchall()
                    if rows and told != (told := frozenset(row[0] for row in rows)):
                        self._blockers = "; ".join(_name(*row) for row in rows)
                        self._tell(f"waiting for locks: {self._blockers}")
            finally:
                if conn is not None:
                    conn.close()


def _name(pid: int, application: str | None, state: str | None, open_s: int | None) -> str:
    """Name a session and the way to end it; its statement may hold a secret."""
    if pid == 0:
        return "a prepared transaction holds them, see pg_prepared_xacts"
    told = [harmless(application) if application else "no application_name", state or "of another user"]
    if open_s is not None:
        told.append(f"in a transaction for {open_s} s")
    return f"pid {pid} holds them ({', '.join(told)}), select pg_terminate_backend({pid}) ends it"
