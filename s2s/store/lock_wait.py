"""Wait for locks without delaying other sessions for long, and report why the database does not answer."""

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

#: Seconds that one try waits for a lock. Statements of other sessions queue behind it meanwhile.
TRY_S: Final = 1.0
#: Seconds between two tries, in which the statements of other sessions run.
PAUSE_S: Final = 2.0
#: Default of the seconds of all tries together.
PATIENCE_S: Final = 300.0
#: Seconds between two reads of the wait state of the watched session. Less than TRY_S, or the watcher would never find
#: the session while it waits for a lock.
_LOOK_S: Final = 0.2
#: Seconds without an answer to the watcher after which the database itself counts as silent.
_SILENT_S: Final = 2.0
_SHOWN: Final = 5
#: The columns of ``pg_stat_activity session`` that are the arguments of :func:`describe_holder` after the pid.
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
#: The wait event of a COMMIT that waits for a standby, and its text. The cause is the standby, not a lock.
_SYNC_REP: Final = "SyncRep"
_STANDBY: Final = "waits until a synchronous standby confirms its COMMIT: see synchronous_standby_names"
_LOCKS: Final = "waiting for locks: "


class Locked(DeadlineExceeded):
    """Another session held a lock for too long; the error is reported to the caller of the operation."""


class _Over(Exception):
    """Ends a trial, so that its savepoint is rolled back."""


@contextmanager
def trial(txn: Cursor) -> Iterator[None]:
    """Run statements on trial: they wait for a lock for at most :data:`TRY_S`, and are rolled back with their locks.

    :raises psycopg2.Error: a statement failed; unless the connection broke, the transaction can continue.
    """
    with suppress(_Over), savepoint(txn, after=f"set local lock_timeout = {round(TRY_S * 1000)}"):
        yield
        raise _Over


class _Watcher:
    """Reads, on a connection of its own, why a session waits.

    :param tell: called in another thread with a line, once for each distinct reason.
    :param locks_only: report only sessions that hold locks.
    :ivar line: the last line found.
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
        """Watch the session for the duration of the context."""
        over = threading.Event()
        # If no thread can start, nothing is reported.
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
                # The wait may have ended during the query.
                if not over.is_set():
                    self._note(*looked)
        except psycopg2.Error as error:  # such as too many connections
            if not self._locks_only and not over.is_set():
                self._note("", f"waiting for the database; reading the reason failed: {translate_error(error, conn)}")
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
        """Return the reason of the wait, and a line that describes it; an empty line: there is nothing to report."""
        txn.execute(_BLOCKERS, (self._pid, _SHOWN))
        if rows := txn.fetchall():
            return frozenset(row[0] for row in rows), _LOCKS + "; ".join(describe_holder(*row) for row in rows)
        if self._locks_only:
            return "", ""
        txn.execute(_EVENT, (self._pid,))
        kind, event = txn.fetchone() or (None, None)
        if event == _SYNC_REP:
            return event, f"waiting for the database: it {_STANDBY}"
        # The wait events of a running statement change all the time, so they count as one reason.
        doing = f": its session, pid {self._pid}, is in the wait event {kind}/{event}" if event else ""
        return "", f"waiting for the database{doing}"


@contextmanager
def late_told(conn: Connection, tell: Callable[[str], object]) -> Iterator[None]:
    """While the main thread waits long for an answer, report why, in one line for each reason.

    :param tell: called in another thread with each line.
    """
    with interruptible.late(_Watcher(conn, tell).watching):
        yield


class LockWait:
    """Runs transactions that need locks, and repeats them until they get the locks or ``patience_s`` is over.

    :param conn: an open connection, not in autocommit.
    :param tell: called in another thread with a line when sessions block this one that were not reported before.
    :param patience_s: the limit on the waiting of all tries together, in seconds.
    """

    def __init__(self, conn: Connection, tell: Callable[[str], object], patience_s: float) -> None:
        self._conn = conn
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s
        self._watcher = _Watcher(conn, tell, locks_only=True)

    def watched(self) -> AbstractContextManager[None]:
        """Return the context in which the sessions that block this one are watched, on another connection."""
        return self._watcher.watching()

    def run(self, work: Callable[[Cursor], T]) -> T:
        """Run ``work`` in a transaction, and commit it.

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
            # Two tries at least: the first one may end before the watcher has found the sessions to name.
            if not is_first and time.monotonic() >= self._deadline:
                blockers = self._watcher.line.removeprefix(_LOCKS)
                raise OperatorError(
                    f"the locks were not free within {self._patience_s:g} s"
                    f"{f': {blockers}' if blockers else ''}: try again when the other sessions are done"
                )
            is_first = False
            time.sleep(PAUSE_S)


def describe_holder(
    pid: int, application: str | None, state: str | None, open_s: int | None, kind: str | None, event: str | None
) -> str:
    """Return a description of a session, and how to end it. Its statement is left out, as it may hold a secret."""
    if pid == 0:
        return "a prepared transaction holds them, see pg_prepared_xacts"
    said = [harmless(application) if application else "no application_name", state or "of another user"]
    if open_s is not None:
        said.append(f"in a transaction for {open_s} s")
    cure = f"select pg_terminate_backend({pid}) ends it"
    if event == _SYNC_REP:
        cure = f"and {_STANDBY}"
    elif kind == "Lock":  # or it is ahead of us in the lock queue
        cure = "and waits for a lock itself"
    return f"pid {pid} holds them ({', '.join(said)}), {cure}"
