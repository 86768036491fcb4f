"""Blocking database calls of the main thread that Ctrl-C ends at once, and that leave no backend behind.

libpq waits in C, where Python handles no signal. A connection is therefore opened in another thread, and psycopg2
waits for answers in Python. The database looks every second whether the client still exists, and ends its backend.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, get_wait_callback, set_wait_callback

from s2s.runtime import own_threads
from s2s.store.connection import connect as open_connection
from s2s.store.driver import Connection

#: Seconds without an answer after which a wait is late.
LATE_S: Final = 5.0
_EVENTS: Final = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}
#: The first version of PostgreSQL that looks, while a statement runs or waits, whether its client still exists.
_LOOKS_SINCE: Final = 140_000
_KEEPALIVES: Final = "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3"
_LOOKS: Final = "set client_connection_check_interval = 1000"


def connect(parameters: Mapping[str, Any]) -> Connection:
    """Connect; in the main thread a signal is handled meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        return open_connection(parameters)
    came: list[Connection | BaseException] = []

    def in_thread() -> None:
        try:
            came.append(open_connection(parameters))
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=in_thread, daemon=True)
    if not own_threads.try_start(thread):
        return open_connection(parameters)
    thread.join()
    [outcome] = came
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


@contextmanager
def waits(conn: Connection) -> Iterator[None]:
    """Handle signals while the main thread waits for an answer; an exception of a handler closes the connection."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _waiting_by(_wait):
        _end_with_client(conn)
        yield


def _end_with_client(conn: Connection) -> None:
    """Have the database end the backend soon after its client has gone, also by SIGKILL."""
    for statement in (_KEEPALIVES, *([_LOOKS] if conn.server_version >= _LOOKS_SINCE else ())):
        try:
            with conn.cursor() as txn:
                txn.execute(statement)
            conn.commit()
        except psycopg2.Error:  # the database's operating system cannot tell
            conn.rollback()


@contextmanager
def copying() -> Iterator[None]:
    """Let psycopg2 wait in C: it has no COPY otherwise."""
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


def _wait(conn: Connection, meanwhile: Callable[[], AbstractContextManager[object]] | None = None) -> None:
    # psycopg2 calls it for the connections of all threads.
    patience_ms = LATE_S * 1000 if meanwhile and threading.current_thread() is threading.main_thread() else None
    with ExitStack() as stack:
        while (state := conn.poll()) != POLL_OK:
            ready = select.poll()
            ready.register(conn.fileno(), _EVENTS[state])
            if not ready.poll(patience_ms) and meanwhile:
                stack.enter_context(meanwhile())
                patience_ms = None
