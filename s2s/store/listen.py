"""Receive NOTIFY on a connection of its own, which reconnects by itself and holds the presence lock of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import psycopg2
from psycopg2.extensions import POLL_OK
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import DatabaseUnavailable
from s2s.runtime import own_threads
from s2s.runtime.clock import cancel
from s2s.store import driver
from s2s.store.availability import Availability
from s2s.store.connection import open_async
from s2s.store.connection_socket import ConnectionSocket
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Connection
from s2s.store.tables.claims import presence_key

#: Seconds that connecting may take, with the first statements.
CONNECT_S: Final = 10.0
#: Seconds between two heartbeats, and seconds within which one must be answered. Together with a reconnect, they take
#: less than :data:`s2s.roles.server.reaper.SURE_S`, after which a process without its presence lock counts as dead.
HEARTBEAT_S: Final = 4.0
ANSWER_S: Final = 4.0
#: Seconds until the next attempt to take the presence lock.
AGAIN_S: Final = 1.0
_NO_ANSWER: Final = f"no answer within {ANSWER_S:g} s"
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
#: Makes the database detect a dead connection in 25 s too (by default in hours): until then it keeps our lock.
_SETTINGS: Final = "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3"


class Listener:
    """Call a function whenever its channel is notified.

    Notifications sent while there is no connection are lost. Every function is therefore also called once after each
    connect, and a caller that needs more has to poll as well.

    :param url: the database URL.
    :param callbacks: by channel. Each is called without arguments, once for all notifications that arrive together.
    :param presence: the ``boot_id`` of this process, whose session advisory lock the connection holds (protocol,
        "Commands").
    :param reactor: for tests.
    """

    log = Logger()

    def __init__(
        self,
        url: str,
        callbacks: Mapping[str, Callable[[], object]],
        *,
        presence: str | None = None,
        application_name: str = "s2s listen",
        reactor: Any = None,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it
        self._reactor = reactor
        self._parameters = driver.Parameters(url, application_name=application_name).read
        self._callbacks = dict(callbacks)
        self._presence = presence
        self._conn: Connection | None = None
        self._cursor: Any = None
        self._socket: ConnectionSocket
        self._connecting: Deferred[None] = succeed(None)
        self._is_stopped = True
        self._availability = Availability(
            self._reactor,
            "notifications of the database do not arrive",
            "notifications of the database arrive again",
        )
        self._pause_s = _FIRST_PAUSE_S
        self._timer: Any = None
        #: Whether this process holds the presence lock.
        self.is_present = False

    @property
    def is_connected(self) -> bool:
        """Whether notifications arrive now."""
        return self._conn is not None

    def start(self) -> None:
        """Connect, and retry for ever."""
        self._is_stopped = False
        self._connect()

    def stop(self) -> Deferred[None]:
        """Close the connection.

        :returns: fires when no thread is connecting any more.
        """
        self._is_stopped = True
        self._availability.stop()
        self._drop()
        return self._connecting

    # --- connecting ----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._timer = None
        # The lookup of a host name blocks, so connect off the reactor thread.
        opened = own_threads.run(self._reactor, _open, self._parameters, list(self._callbacks))
        self._connecting = opened.addCallback(self._connected).addErrback(self._failed)

    def _connected(self, conn: Connection) -> None:
        if self._is_stopped:
            conn.close()
            return
        try:
            self._socket = ConnectionSocket(
                conn, self._reactor, self._ready, lambda why: self._lost(DatabaseUnavailable(why))
            )
        except OSError:
            conn.close()
            raise
        self._conn = conn
        self._pause_s = _FIRST_PAUSE_S
        self._availability.note(None)
        self._beat()
        self._call(self._callbacks)

    def _failed(self, reason: Failure) -> None:
        error = reason.value
        self._lost(
            driver.translate_error(error) if isinstance(error, psycopg2.Error) else DatabaseUnavailable(repr(error))
        )

    def _lost(self, error: BaseException) -> None:
        self._drop()
        if self._is_stopped:
            return
        self._availability.note(error)
        self._timer = self._reactor.callLater(self._pause_s, self._connect)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _drop(self) -> None:
        cancel(self._timer)
        self._timer = None
        if self._conn is not None:
            self._socket.close()
            self._conn.close()
            self._conn = self._cursor = None
            self.is_present = False

    # --- connected -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Send a query, because a connection that died silently does not answer.

        The query asks for the presence lock until this connection has it: after a reconnect, the database may still
        hold the lock for the lost connection.
        """
        assert self._conn is not None
        self._timer = self._reactor.callLater(ANSWER_S, self._lost, DatabaseUnavailable(_NO_ANSWER))
        try:
            self._cursor = self._conn.cursor(cursor_factory=StoreCursor)
            if self._presence is None or self.is_present:
                self._cursor.execute("select false")
            else:
                self._cursor.execute("select pg_try_advisory_lock(%s)", (presence_key(self._presence),))
        except psycopg2.Error as error:
            self._lost(driver.translate_error(error, self._conn))

    def _answered(self) -> None:
        self.is_present |= self._cursor.fetchone()[0]
        self._cursor = None
        self._timer.cancel()
        is_complete = self.is_present or self._presence is None
        self._timer = self._reactor.callLater(HEARTBEAT_S if is_complete else AGAIN_S, self._beat)

    def _ready(self) -> None:
        """Read the database's messages."""
        if self._conn is None:
            return  # the reactor had two events
        try:
            state = self._conn.poll()
            if state == POLL_OK and self._cursor is not None:
                self._answered()
        except psycopg2.Error as error:
            self._lost(driver.translate_error(error, self._conn))
            return
        heard = {notification.channel for notification in self._conn.notifies}
        self._conn.notifies.clear()
        self._call(heard)

    def _call(self, channels: Any) -> None:
        for channel in channels:
            try:
                self._callbacks[channel]()
            except Exception:
                self.log.failure("the callback of {channel} failed", channel=channel)


def _open(parameters: Callable[[], dict[str, Any]], channels: list[str]) -> Connection:
    """Connect in a thread, and listen."""
    listens = "; ".join(f'listen "{channel}"' for channel in channels)
    return open_async(parameters, CONNECT_S, 0.0, f"{_SETTINGS}; {listens}")
