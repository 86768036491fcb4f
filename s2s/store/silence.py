"""Statements to which no answer comes, on connections that look alive.

A proxy or a firewall between us and the database may forget a connection and go on to acknowledge its bytes. No timeout
of the database and no keepalive of TCP ends the wait for the answer then. Another connection shows whether the database
works on the statement: a COMMIT may wait for a standby for hours, and is left alone. A backend that works on although
the timeout of its statement is long over hangs itself, as with a disk that does not answer: it is given up.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, Final

import psycopg2
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from s2s.errors import S2SError
from s2s.runtime import own_threads
from s2s.store.connection import PlanningConnection
from s2s.store.driver import Cursor

#: Seconds without an answer after which the database is asked about the session: more than the statement timeout of our
#: own statements, so that hardly any statement that it works on is asked about.
SILENT_S: Final = 10.0
#: Seconds between two looks at the connections of a process.
LOOK_S: Final = 2.0
#: Seconds beyond the timeout of a statement after which its backend hangs.
HUNG_S: Final = 22.0
#: Backends of a pool that hang and have been given up. Each stays a session of the database; with more of them none is
#: given up, and none is opened in its place.
MOST_HUNG: Final = 4
#: Seconds between two looks at a session that reads, where ``track_activities`` is off and nothing tells since when.
_AGAIN_S: Final = 2.0
#: What a session does. One that has waited for a statement of ours for so long that an answer under way would have
#: arrived is ended, and its locks are free.
_LOOK: Final = (
    "set local role none;"
    " select case when (state like 'idle%%' and clock_timestamp() - state_change >= make_interval(secs => %s)"
    " or state = 'disabled' and wait_event = 'ClientRead' and %s) and pg_terminate_backend(pid) then 'idle'"
    " when state = 'disabled' and wait_event = 'ClientRead' then 'reading'"
    " when wait_event = 'SyncRep' then 'standby' else 'working' end"
    " from pg_stat_activity where pid = %s and backend_start = %s"
)


class Silence:
    """Closes connections on which an answer is awaited for which the database does not work.

    :param connections: returns those to look at.
    :param another: opens a connection for one short transaction, in a thread.
    :param statement_timeout_s: seconds after which the database cancels a statement on them.
    :param tell: called for each connection that is closed.
    :param reactor: an ``IReactorTime`` and ``IReactorThreads``.
    """

    log = Logger()

    def __init__(
        self,
        connections: Callable[[], Iterable[PlanningConnection]],
        another: Callable[[], AbstractContextManager[Cursor]],
        statement_timeout_s: float,
        tell: Callable[[], object],
        reactor: Any,
    ) -> None:
        self._connections = connections
        self._another = another
        self._statement_timeout_s = statement_timeout_s
        #: The sessions whose backends hang.
        self._hung: set[tuple[int, str]] = set()
        self._tell = tell
        self._reactor = reactor
        self._checking: set[PlanningConnection] = set()
        self._loop = LoopingCall(self._look)
        self._loop.clock = reactor

    def start(self) -> None:
        """Look from now on."""
        self._loop.start(LOOK_S, now=False)

    def stop(self) -> None:
        """Look no more."""
        if self._loop.running:
            self._loop.stop()

    def _look(self) -> None:
        now = time.monotonic()
        for conn in self._connections():
            since = conn.asked_at
            if since is not None and now - since > SILENT_S and conn not in self._checking:
                self._checking.add(conn)
                ended = own_threads.run(self._reactor, self._end_if_silent, conn, since)
                ended.addCallbacks(self._ended, self._failed).addBoth(self._checked, conn)

    def _checked(self, _: object, conn: PlanningConnection) -> None:
        self._checking.discard(conn)

    def _ended(self, why: str) -> None:
        if why:
            self._tell()
            self.log.warn("a connection to the database was closed, on which no answer came: {why}", why=why)

    def _failed(self, failure: Any) -> None:
        # While the database is away the pool says so.
        if not failure.check(S2SError):
            self.log.failure("a connection without an answer could not be looked at", failure)

    # --- in a thread -------------------------------------------------------------------------------------------------

    def _end_if_silent(self, conn: PlanningConnection, since: float) -> str:
        """Close the connection if the answer is still awaited and will not come.

        :returns: why it was closed; empty: it was not.
        """
        # Without a session it is being prepared: nothing that it was asked has an effect.
        why = _SILENT if conn.session is None else self._why(conn, conn.session, since)
        if not why or conn.asked_at != since:
            return ""
        with suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(conn.fileno())) as handle:
            handle.shutdown(socket.SHUT_RDWR)
        return why

    def _why(self, conn: PlanningConnection, session: tuple[int, str], since: float) -> str:
        """Ask the database why no answer comes; empty: it may come."""
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
        """Look at what a session does.

        :param has_read: it has waited for a statement for a while, so that its answer would have arrived.
        """
        with self._another() as txn:
            txn.execute(_LOOK, (SILENT_S, has_read, *session))
            return [state for (state,) in txn.fetchall()]


_SILENT: Final = (
    "the database does not work for it: look at what is between them, such as a proxy or a firewall, which forgets"
    " connections"
)
