"""Detect statements that get no answer on connections that look alive.

A proxy or a firewall between us and the database may forget a connection and still acknowledge its bytes. Then no
timeout of the database and no TCP keepalive ends the wait for the answer. Another connection shows whether the database
works on the statement. A COMMIT may wait for a standby for hours, and is left alone. A backend that still works
although the timeout of its statement is long over hangs itself, as with a disk that does not answer: its connection is
closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Final

from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from s2s.errors import DatabaseUnavailable, S2SError
from s2s.runtime import own_threads
from s2s.store.connection import PlanningConnection
from s2s.store.connection_socket import shut_down
from s2s.store.driver import Cursor

#: Seconds without an answer after which the database is queried about the session: more than the statement timeout of
#: our own statements, so that this rarely happens for a statement that the database works on.
SILENT_S: Final = 10.0
#: Seconds between two checks of the connections of a process.
LOOK_S: Final = 2.0
#: Seconds beyond the timeout of a statement after which its backend counts as hung.
HUNG_S: Final = 22.0
#: The most hung backends of a pool whose connections are closed. Each remains a session of the database. At this
#: number, no further connection is closed, and none is opened in its place.
MOST_HUNG: Final = 4
#: Seconds between two checks of a session that reads, if ``track_activities`` is off and the start of the read is
#: unknown.
_AGAIN_S: Final = 2.0
#: SQL that returns the activity of a session. It ends a session that has been idle for so long that an answer in
#: transit would have arrived; that also releases the session's locks.
_LOOK: Final = (
    "set local role none;"
    " select case when (state like 'idle%%' and clock_timestamp() - state_change >= make_interval(secs => %s)"
    " or state = 'disabled' and wait_event = 'ClientRead' and %s) and pg_terminate_backend(pid) then 'idle'"
    " when state = 'disabled' and wait_event = 'ClientRead' then 'reading'"
    " when wait_event = 'SyncRep' then 'standby' else 'working' end"
    " from pg_stat_activity where pid = %s and backend_start = %s"
)


class Silence:
    """Closes connections that wait for an answer that the database does not work on.

    :param connections: returns the connections to check.
    :param another: opens a connection for one short transaction; called in a thread.
    :param statement_timeout_s: seconds after which the database cancels a statement on the checked connections.
    :param tell: called for each connection that is closed.
    :param tell_away: called with the error if the database answers on no other connection either.
    :param reactor: an ``IReactorTime`` and ``IReactorThreads``.
    """

    log = Logger()

    def __init__(
        self,
        connections: Callable[[], Iterable[PlanningConnection]],
        another: Callable[[], AbstractContextManager[Cursor]],
        statement_timeout_s: float,
        tell: Callable[[], object],
        tell_away: Callable[[BaseException], object],
        reactor: Any,
    ) -> None:
        self._connections = connections
        self._another = another
        self._statement_timeout_s = statement_timeout_s
        #: The sessions whose backends hang.
        self._hung: set[tuple[int, str]] = set()
        self._tell = tell
        self._tell_away = tell_away
        self._reactor = reactor
        self._checking: set[PlanningConnection] = set()
        self._loop = LoopingCall(self._look)
        self._loop.clock = reactor

    def start(self) -> None:
        """Start the checks."""
        self._loop.start(LOOK_S, now=False)

    def stop(self) -> None:
        """Stop the checks."""
        if self._loop.running:
            self._loop.stop()

    def _look(self) -> None:
        now = time.monotonic()
        for conn in self._connections():
            since = conn.asked_at
            if since is not None and now - since > SILENT_S and conn not in self._checking:
                self._checking.add(conn)
                ended = own_threads.run(self._reactor, self._end_if_silent, conn, since)
                ended.addCallbacks(self._ended, self._failed, errbackArgs=(conn, since)).addBoth(self._checked, conn)

    def _checked(self, _: object, conn: PlanningConnection) -> None:
        self._checking.discard(conn)

    def _ended(self, why: str) -> None:
        if why:
            self._tell()
            self.log.warn("closed a connection to the database that did not answer: {why}", why=why)

    def _failed(self, failure: Any, conn: PlanningConnection, since: float) -> None:
        error = failure.value
        if isinstance(error, DatabaseUnavailable) and not error.state and conn.asked_at == since:
            # A pool whose statements all wait for their answers does not report it.
            told = f"no answer for {SILENT_S:g} s, and none on a new connection: {error}"
            self._tell_away(DatabaseUnavailable(told))
        elif not failure.check(S2SError):
            self.log.failure("the check of a connection without an answer failed", failure)

    # --- in a thread -------------------------------------------------------------------------------------------------

    def _end_if_silent(self, conn: PlanningConnection, since: float) -> str:
        """Close the connection if it still waits for an answer that will not come.

        :returns: why it was closed; empty: it was not.
        """
        # A connection without a session is being prepared, so its statements have no effect.
        why = _SILENT if conn.session is None else self._why(conn, conn.session, since)
        if not why or conn.asked_at != since:
            return ""
        shut_down(conn)
        return why

    def _why(self, conn: PlanningConnection, session: tuple[int, str], since: float) -> str:
        """Query the database for the reason of the missing answer; empty: the answer may still come."""
        doing = self._doing(session, has_read=False)
        if doing == ["reading"]:
            time.sleep(_AGAIN_S)
            if conn.asked_at != since:
                return ""
            doing = self._doing(session, has_read=True)
        if doing in ([], ["idle"]):
            return _SILENT
        silent_s = time.monotonic() - since
        if doing in (["standby"], ["reading"]) or silent_s < self._statement_timeout_s + HUNG_S:
            return ""
        with self._another() as txn:
            txn.execute("select pid, backend_start::text from pg_stat_activity")
            self._hung.intersection_update(txn.fetchall())
        if len(self._hung) >= MOST_HUNG:
            return ""
        self._hung.add(session)
        return f"its backend hangs in its statement, whose timeout is over: see process {session[0]} of the database"

    def _doing(self, session: tuple[int, str], *, has_read: bool) -> list[str]:
        """Return the activity of a session.

        :param has_read: the session has waited for a statement for a while, so that its answer would have arrived.
        """
        with self._another() as txn:
            txn.execute(_LOOK, (SILENT_S, has_read, *session))
            return [state for (state,) in txn.fetchall()]


_SILENT: Final = (
    "the database does not work for it: look at the devices between them, such as a proxy or a firewall, which forgets"
    " connections"
)
