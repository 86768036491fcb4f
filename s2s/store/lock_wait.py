"""Waiting for locks without holding anybody up for long, and naming what keeps the database from an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, TypeVar

import psycopg2
from psycopg2.errors import DeadlockDetected, LockNotAvailable

from s2s.errors import DeadlineExceeded, OperatorError, harmless
from s2s.runtime import own_threads
from s2s.store import interruptible
from s2s.store.connection import SET_PATH, connect
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Connection, Cursor, commit, savepoint, translate_error

T = TypeVar("T")

#: Seconds that one try waits for a lock. Statements of others queue behind it meanwhile.
TRY_S: Final = 1.0
#: Seconds between two tries, in which the statements of others run.
PAUSE_S: Final = 2.0
#: Seconds of all tries together, where the caller says nothing.
PATIENCE_S: Final = 300.0
#: Seconds between two looks at what we wait for; less than TRY_S, or a look would never find us waiting for a lock.
_LOOK_S: Final = 0.2
#: Seconds without an answer to a look after which the database itself counts as silent.
_SILENT_S: Final = 2.0
_SHOWN: Final = 5
#: The columns of ``pg_stat_activity session`` that :func:`describe_holder` takes after the pid.
HOLDER: Final = (
    "session.application_name, session.state, extract(epoch from clock_timestamp() - session.xact_start)::bigint,"
    " session.wait_event_type, session.wait_event"
)
#: The pid 0 stands for a prepared transaction.
_BLOCKERS: Final = f"""
select blocker.pid, {HOLDER}
from (select distinct unnest(pg_blocking_pids(%s)) as pid) blocker left join pg_stat_activity session using (pid)
order by session.xact_start limit %s
"""  # noqa: S608 - of constants
_EVENT: Final = "select wait_event_type, wait_event from pg_stat_activity where pid = %s"
#: The wait event of a COMMIT that waits for its standby, and its text. The cause is the standby, and not a lock.
_SYNC_REP: Final = "SyncRep"
_STANDBY: Final = "waits until a synchronous standby confirms its COMMIT: see synchronous_standby_names"
_LOCKS: Final = "waiting for locks: "


class Locked(DeadlineExceeded):
    """Another session holds a lock that was not free in time, for work whose caller is told so."""


class _Over(Exception):
    """A trial is over: what it has done is undone."""


@contextmanager
def trial(txn: Cursor) -> Iterator[None]:
    """Do something on trial: it waits for a lock for :data:`TRY_S` only, and is undone, with its locks, at its end.

    :raises psycopg2.Error: a statement failed; unless the connection broke, the transaction goes on.
    """
    with suppress(_Over), savepoint(txn, after=f"set local lock_timeout = {round(TRY_S * 1000)}"):
        yield
        raise _Over


class _Watcher:
    """Looks, on a connection of its own, for what a session waits for.

    :param tell: called with a line, in another thread, for each thing that it has not been called with before.
    :param locks_only: tell of nothing but the sessions that hold locks.
    :ivar line: the last one that there was to tell.
    """

    def __init__(self, conn: Connection, tell: Callable[[str], object], *, locks_only: bool = False) -> None:
        info = conn.info
        self._beside: dict[str, Any] = {**info.dsn_parameters, "password": info.password}
        self._pid = info.backend_pid
        self._tell = tell
        self._locks_only = locks_only
        self._told: set[frozenset[int] | str] = set()
        self.line = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look meanwhile."""
        over = threading.Event()
        # Without a thread nothing is told.
        own_threads.try_start(threading.Thread(target=self._watch, args=(over,), daemon=True))
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        conn: Connection | None = None
        silent = threading.Timer(_SILENT_S, self._note_silence, (over,))
        silent.daemon = True
        own_threads.try_start(silent)
        try:
            while not over.wait(_LOOK_S):
                if conn is None:
                    conn = connect(self._beside)
                    conn.autocommit = True
                    with conn.cursor(cursor_factory=StoreCursor) as txn:
                        txn.execute(SET_PATH)
                with conn.cursor(cursor_factory=StoreCursor) as txn:
                    looked = self._look(txn)
                silent.cancel()
                # The answer may have come during the look.
                if not over.is_set():
                    self._note(*looked)
        except psycopg2.Error as error:  # such as no connection to spare
            if not self._locks_only and not over.is_set():
                self._note("", f"waiting for the database, and a look what for failed: {translate_error(error, conn)}")
        finally:
            silent.cancel()
            if conn is not None:
                conn.close()

    def _note_silence(self, over: threading.Event) -> None:
        if not self._locks_only and not over.is_set():
            self._note("", "waiting for the database: it answers no other session either")

    def _note(self, thing: frozenset[int] | str, line: str) -> None:
        self.line = line or self.line
        if line and thing not in self._told:
            self._told.add(thing)
            self._tell(line)

    def _look(self, txn: Cursor) -> tuple[frozenset[int] | str, str]:
        """Return what is waited for, and the line that says so; empty: there is nothing to say."""
        txn.execute(_BLOCKERS, (self._pid, _SHOWN))
        if rows := txn.fetchall():
            return frozenset(row[0] for row in rows), _LOCKS + "; ".join(describe_holder(*row) for row in rows)
        if self._locks_only:
            return "", ""
        txn.execute(_EVENT, (self._pid,))
        kind, event = txn.fetchone() or (None, None)
        if event == _SYNC_REP:
            return event, f"waiting for the database: it {_STANDBY}"
        # The events of a statement that is at work change all the time: they share a line.
        doing = f": its session, pid {self._pid}, is in the wait event {kind}/{event}" if event else ""
        return "", f"waiting for the database{doing}"


@contextmanager
def late_told(conn: Connection, tell: Callable[[str], object]) -> Iterator[None]:
    """While the main thread waits for an answer for long, tell what for, in a line for each thing.

    :param tell: called with a line, in another thread.
    """
    with interruptible.late(_Watcher(conn, tell).watching):
        yield


class LockWait:
    """Runs transactions that need locks, again and again until they get them or the patience is over.

    :param conn: an open connection, not in autocommit.
    :param tell: called with a line, in another thread, when sessions block us that have not been told of.
    :param patience_s: seconds of all waiting.
    """

    def __init__(self, conn: Connection, tell: Callable[[str], object], patience_s: float) -> None:
        self._conn = conn
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._watcher = _Watcher(conn, tell, locks_only=True)

    def watched(self) -> AbstractContextManager[None]:
        """Look, on a connection of its own, for the sessions that block us."""
        return self._watcher.watching()

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
            except (LockNotAvailable, DeadlockDetected, Locked):
                self._conn.rollback()
            # One try may end before the watcher has found the sessions to name.
            if not is_first and time.monotonic() >= self._deadline:
                blockers = self._watcher.line.removeprefix(_LOCKS)
                raise OperatorError(
                    f"the locks were not free within {self._patience_s:g} s"
                    f"{f': {blockers}' if blockers else ''}: try again when the others are done"
                )
            is_first = False
            time.sleep(PAUSE_S)


def describe_holder(
    pid: int, application: str | None, state: str | None, open_s: int | None, kind: str | None, event: str | None
) -> str:
    """Name a session and the way to end it; its statement may hold a secret."""
    if pid == 0:
        return "a prepared transaction holds them, see pg_prepared_xacts"
    said = [harmless(application) if application else "no application_name", state or "of another user"]
    if open_s is not None:
        said.append(f"in a transaction for {open_s} s")
    cure = f"select pg_terminate_backend({pid}) ends it"
    if event == _SYNC_REP:
        cure = f"and {_STANDBY}"
    elif kind == "Lock":  # or it stands before us in the queue
        cure = "and waits for a lock itself"
    return f"pid {pid} holds them ({', '.join(said)}), {cure}"
