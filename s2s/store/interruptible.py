"""Blocking database calls in the main thread that Ctrl-C ends at once, and that leave no backend behind.

libpq waits in C, where Python handles no signal. A connection is therefore opened in another thread, and psycopg2 waits
for answers in Python. The database checks every second whether the client still exists; if not, it ends the client's
backend.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, get_wait_callback, set_wait_callback

from s2s.errors import harmless
from s2s.runtime import streams
from s2s.store.connection import PlanningConnection
from s2s.store.connection import connect as open_connection
from s2s.store.driver import Connection

#: Seconds without an answer after which a wait counts as late.
LATE_S: Final = 5.0
_EVENTS: Final = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}
#: The first version of PostgreSQL that can check, while a statement runs or waits, whether its client still exists.
_LOOKS_SINCE: Final = 140_000
_KEEPALIVES: Final = "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3"
_LOOKS: Final = "set client_connection_check_interval = 1000"


class Patience:
    """The time limit of the main thread's wait for a connection and its answers, and the line on stderr about it.

    :param parameters: the connection parameters.
    :param within_s: seconds from now on.
    """

    def __init__(self, parameters: Mapping[str, Any], within_s: float) -> None:
        host = parameters.get("host") or parameters.get("hostaddr")
        service = parameters.get("service")
        self._place = harmless(str(host or (f"service {service}" if service else "its local socket")))
        self._within_s = within_s
        self._began_at = time.monotonic()
        self._is_told = False
        self._is_over = False

    @property
    def left_s(self) -> float | None:
        """Seconds until :meth:`spend` is due; ``None``: it is not due any more."""
        if self._is_over:
            return None
        due_s = self._within_s if self._is_told else min(LATE_S, self._within_s)
        return max(0.0, self._began_at + due_s - time.monotonic())

    def spend(self, reason: str) -> None:
        """Print the reason of the wait, or raise if the time is over.

        :param reason: the reason of the wait, for the operator.
        :raises psycopg2.OperationalError: the time is over.
        """
        if time.monotonic() >= self._began_at + self._within_s:
            raise psycopg2.OperationalError(f"no answer of the database at {self._place} within {self._within_s:g} s")
        if not self._is_told:
            self._is_told = True
            streams.say(f"waiting for the database at {self._place}: {reason}")

    def join(self, thread: threading.Thread) -> None:
        """Wait for the end of the connecting thread."""
        while thread.is_alive():
            thread.join(self.left_s)
            if thread.is_alive():
                self.spend("there is no connection yet: see its name server, the host and the network")

    def end(self) -> None:
        """End the time limit and the line about it."""
        self._is_over = True


def connect(parameters: Mapping[str, Any], patience: Patience) -> PlanningConnection:
    """Connect; the main thread handles signals meanwhile.

    :raises psycopg2.OperationalError: there is no connection, or the time limit of the main thread is over.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return open_connection(parameters, patience.join if is_main else None)


@contextmanager
def waits(conn: Connection, patience: Patience) -> Iterator[None]:
    """Handle signals while the main thread waits for an answer; an exception of a handler closes the connection."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _waiting_by(partial(_wait, patience=patience)):
        _end_with_client(conn)
        yield


def _end_with_client(conn: Connection) -> None:
    """Make the database end the backend soon after its client has gone, also after a SIGKILL."""
    for statement in (_KEEPALIVES, *([_LOOKS] if conn.server_version >= _LOOKS_SINCE else ())):
        try:
            with conn.cursor() as txn:
                txn.execute(statement)
            conn.commit()
        except psycopg2.Error:  # the database's operating system lacks the feature
            if conn.closed:
                raise
            conn.rollback()


@contextmanager
def copying() -> Iterator[None]:
    """Let psycopg2 wait in C, because COPY works in no other way."""
    with _waiting_by(None):
        yield


@contextmanager
def late(meanwhile: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Enter a context while the main thread waits for an answer that has not come within :data:`LATE_S`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _waiting_by(partial(_wait, meanwhile=meanwhile)):
        yield


@contextmanager
def _waiting_by(callback: Any) -> Iterator[None]:
    before = get_wait_callback()
    set_wait_callback(callback)
    try:
        yield
    finally:
        set_wait_callback(before)


def _wait(
    conn: Connection,
    patience: Patience | None = None,
    meanwhile: Callable[[], AbstractContextManager[object]] | None = None,
) -> None:
    # psycopg2 calls this function for the connections of all threads.
    is_main = threading.current_thread() is threading.main_thread()
    late_s = LATE_S if is_main and meanwhile else None
    with ExitStack() as stack:
        while (state := conn.poll()) != POLL_OK:
            ready = select.poll()
            ready.register(conn.fileno(), _EVENTS[state])
            left_s = patience.left_s if is_main and patience else late_s
            if ready.poll(None if left_s is None else left_s * 1000):
                continue
            if patience:
                patience.spend("its session gets no answer: see a pooler without a free one, or a proxy between us")
            elif meanwhile:
                stack.enter_context(meanwhile())
                late_s = None
