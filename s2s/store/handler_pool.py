"""Transactions that run foreign code: command handlers, jobs and orders, on connections that nothing of ours shares.

Each call of foreign code has a deadline. Past it the SQL of the call is cancelled, again and again, and the call fails
with :class:`HandlerTimeout`. A call that does not return even then is *stuck*: Python cannot end a thread. The pool
abandons that thread and opens another one in its place, up to :data:`MOST_STUCK`; the transaction of a stuck call is
never committed.

Foreign code may leave anything on a session: a role, settings, temporary tables, advisory locks, cursors. After each
call the transaction has its role and settings again, and after each transaction the connection is made clean or closed.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from typing import Any, Final, TypeVar, cast

import psycopg2
from psycopg2.extensions import set_wait_callback
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import DatabaseUnavailable, HandlerStuck, HandlerTimeout, S2SError, describe
from s2s.runtime import own_threads
from s2s.runtime.clock import Timer, cancel
from s2s.runtime.memory import Memory
from s2s.store.connection import PlanningConnection
from s2s.store.cursor import StoreCursor, plain
from s2s.store.driver import Connection, Cursor, is_broken, is_in_transaction, savepoint
from s2s.store.pool import Database

T = TypeVar("T")

#: Seconds that a call of foreign code may take, where no setting says otherwise.
TIMEOUT_S: Final = 60.0
#: Seconds after the deadline in which the SQL of a call is cancelled, before the call counts as stuck.
PATIENCE_S: Final = 5.0
#: Seconds between two looks at the calls under way, and between two cancellations of one call.
_WATCH_S: Final = 0.25
_CANCEL_S: Final = 1.0
#: Seconds between two looks, beyond those that are planned and without use of a CPU, from which on the process stood
#: still: a debugger, ``docker pause`` or a machine without a free core is no fault of a call.
_STILL_S: Final = 1.0
#: The SQLSTATE of a statement that was cancelled.
_QUERY_CANCELED: Final = "57014"
#: PostgreSQL refuses to PREPARE a transaction that has executed UNLISTEN. Prepared by foreign code, it would keep its
#: locks on the commands of others for ever, or be committed after they have run once more.
_NEVER_PREPARED: Final = "unlisten *; "
#: Foreign code finds its tables by the search_path of its user and its database, and not by ours.
_OWN_PATH: Final = "set local search_path to default"
#: Seconds of a call after which the memory of the process is looked at: some megabytes are not written in less.
_LARGE_S: Final = 0.001
#: The exit code of a process that foreign code has forked and not ended.
_FORKED: Final = 70
#: Stuck threads of one process. Each costs a thread and about 100 kB; at this number no further call begins.
MOST_STUCK: Final = 8


def call(function: Callable[..., T], *args: Any) -> T:
    """Call foreign code in a context of its own: what it sets there, such as a precision of decimals, ends with it."""
    return Context().run(function, *args)


class _Local(threading.local):
    """The task of each thread."""

    task: Task | None = None


class Task:
    """One transaction that runs foreign code.

    :ivar name: the call under way, or the last one, for people.
    :ivar subject: what it works on.
    :ivar entered_at: when the call under way began, in monotonic seconds; ``None``: none is under way.
    :ivar is_abandoned: the thread is stuck, and its transaction must not be committed.
    """

    def __init__(self) -> None:
        self.outcome: Deferred[Any] = Deferred()
        self.name = ""
        self.subject: Any = None
        self.connection: Connection | None = None
        self.is_late = False
        self.is_abandoned = False
        self.cancelled_at = float("-inf")
        self.on_return: Callable[[], object] = lambda: None
        self.entered_at: float | None = None
        self._lock = threading.Lock()
        #: Held while a cancellation or the end of the session is on its way: neither must meet what comes after it.
        self.cancelling = threading.Lock()

    def enter(self, name: str, subject: Any) -> None:
        """Note that foreign code begins. In the thread."""
        with self._lock:
            self.name, self.subject, self.is_late, self.entered_at = name, subject, False, time.monotonic()

    def leave(self) -> None:
        """Note that foreign code has returned. In the thread.

        :raises DatabaseUnavailable: the thread was abandoned meanwhile.
        """
        with self.cancelling, self._lock:
            self.entered_at = None
        self.check()

    def check(self) -> None:
        """Refuse to go on with an abandoned transaction.

        :raises DatabaseUnavailable: it is one.
        """
        if self.is_abandoned:
            raise DatabaseUnavailable("the call was stuck, and its transaction was abandoned")

    def running_s(self) -> float:
        """Return the seconds since foreign code began; 0 where none runs."""
        since = self.entered_at
        return 0.0 if since is None else time.monotonic() - since

    def stood_still(self, for_s: float) -> None:
        """Take the seconds in which the process stood still out of the call under way."""
        with self._lock:
            if self.entered_at is not None:
                self.entered_at = min(self.entered_at + for_s, time.monotonic())

    def abandon(self) -> bool:
        """Give the thread up, unless it has returned from foreign code by now."""
        with self._lock:
            self.is_abandoned = self.entered_at is not None
        return self.is_abandoned


class HandlerPool(Database):
    """A pool of connections for foreign code.

    :param owner: the pool of our own statements; its URL, counters and log lines serve this one, too.
    :param application_name: the name of the sessions in ``pg_stat_activity``.
    :param threads: transactions at once, beside those that are stuck.
    :param timeout_s: seconds that a call of foreign code may take, with all its SQL.
    :ivar stuck: the tasks whose thread does not return.
    """

    log = Logger()

    def __init__(self, owner: Database, application_name: str, *, threads: int, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(
            owner.url,
            application_name,
            threads=threads,
            # By the database, too: it holds while this process stands still.
            statement_timeout_s=timeout_s + PATIENCE_S,
            idle_timeout_s=timeout_s + 2 * PATIENCE_S,
            counters=owner.counters,
            reactor=owner.reactor,
        )
        self._owner = owner
        self.availability = owner.availability
        self.timeout_s = timeout_s
        self.stuck: list[Task] = []
        self._tasks: set[Task] = set()
        self._local = _Local()
        self._memory = Memory()
        self._watching: Timer | None = None
        #: When the last look was, in monotonic seconds and in seconds of the process's CPU time.
        self._watched_at = (0.0, 0.0)

    def run(self, work: Callable[..., T], *args: Any) -> Deferred[T]:
        """Do as :meth:`Database.run`; foreign code is called inside :meth:`foreign`.

        :returns: fails with :class:`HandlerStuck` as soon as a call of foreign code counts as stuck.
        """
        refused = self.refusal()
        if refused is not None:
            return refused
        if self.is_full:
            return defer.fail(DatabaseUnavailable(f"{MOST_STUCK} handlers are stuck in this process: start it again"))
        task = Task()
        self._unfinished += 1
        self._tasks.add(task)
        running = own_threads.run_in(
            self.reactor, self._pool.threadpool, self._interact, self._pool, partial(self._tracked, task, work), args
        )
        running.addBoth(self._returned, task)
        if self._watching is None:
            self._watch_later()
        return task.outcome

    @property
    def is_full(self) -> bool:
        """Whether the bound of stuck calls is reached, so that no further call may begin."""
        return len(self.stuck) >= MOST_STUCK

    def _returned(self, outcome: Any, task: Task) -> None:
        if task.is_abandoned:
            self.stuck.remove(task)
            task.on_return()
            return
        self._tasks.discard(task)
        self._leave(None)
        if isinstance(outcome, Failure):
            task.outcome.errback(outcome)
        else:
            task.outcome.callback(outcome)

    # --- the watch, in the reactor's thread --------------------------------------------------------------------------

    def _watch_later(self) -> None:
        self._watched_at = time.monotonic(), time.process_time()
        self._watching = self.reactor.callLater(_WATCH_S, self._watch)

    def _watch(self) -> None:
        self._watching = None
        at, used = self._watched_at
        # A call that holds the interpreter uses the CPU meanwhile.
        still_s = time.monotonic() - at - _WATCH_S - (time.process_time() - used)
        for task in self._tasks if still_s > _STILL_S else ():
            task.stood_still(still_s)
        for task in list(self._tasks):
            over_s = task.running_s() - self.timeout_s
            if over_s > PATIENCE_S:
                self._abandon(task)
            elif over_s > 0:
                self._cancel_late(task)
        if self._tasks:
            self._watch_later()

    def _cancel_late(self, task: Task) -> None:
        task.is_late = True
        now = time.monotonic()
        if now >= task.cancelled_at + _CANCEL_S:
            task.cancelled_at = now
            self._in_background(self._cancel_call, task, task.entered_at)

    def _abandon(self, task: Task) -> None:
        if not task.abandon():
            return
        self._tasks.discard(task)
        self.stuck.append(task)
        # Another thread takes its place. When this one returns, its connection is gone: the number of connections stays
        # within the number of threads at once.
        most = max(self._pool.threadpool.max, self._threads + len(self.stuck))
        self._pool.threadpool.adjustPoolsize(maxthreads=most)
        self.counters.meet("handler")
        self._leave(None)
        task.outcome.errback(HandlerStuck(task, task.subject, f"{self._too_late()}, and it does not return"))

    def end(self, task: Task) -> Deferred[Any]:
        """End the session of a stuck task: its locks are free then, and its transaction is rolled back.

        A thread that has returned meanwhile ends the session itself.

        :returns: fires when the session has ended, or the database does not answer.
        """
        return self._in_background(self._terminate, task)

    def _in_background(self, work: Callable[..., None], *args: Any) -> Deferred[Any]:
        done = own_threads.run(self.reactor, work, *args)
        return done.addErrback(lambda failure: self.log.failure("a late handler could not be cancelled", failure))

    # --- in another thread -------------------------------------------------------------------------------------------

    def _cancel_call(self, task: Task, entered_at: float | None) -> None:
        # One at a time: while the database hangs, each takes seconds.
        if task.cancelling.acquire(blocking=False):
            try:
                # Not the call after it.
                if entered_at is not None and task.entered_at == entered_at:
                    self._signal(task, "pg_cancel_backend")
            finally:
                task.cancelling.release()

    def _signal(self, task: Task, function: str) -> None:
        # Not by psycopg2's own cancel(): it keeps the whole interpreter waiting for a database that hangs.
        session = getattr(task.connection, "session", None)
        if session is None:
            return
        with suppress(S2SError), self.shutdown_transaction() as txn:
            # Another session may have the process's number by now.
            txn.execute(
                # A default role of our user may not see or signal the sessions of that user.
                f"set local role none; select {function}(pid)"  # noqa: S608
                " from pg_stat_activity where pid = %s and backend_start = %s",
                session,
            )

    def _terminate(self, task: Task) -> None:
        # Its connection stays as it is: a thread that returns waits for it.
        with task.cancelling:
            if task.entered_at is None:
                return
            self._signal(task, "pg_terminate_backend")
            # The code may have closed its descriptor.
            with (
                suppress(OSError, psycopg2.Error),
                socket.socket(fileno=os.dup(cast(Any, task.connection).fileno())) as handle,
            ):
                handle.shutdown(socket.SHUT_RDWR)

    # --- in the thread of a task -------------------------------------------------------------------------------------

    def _tracked(self, task: Task, work: Callable[..., T], txn: Cursor, *args: Any) -> T:
        task.connection = txn.connection
        self._local.task = task
        return work(txn, *args)

    def _go_on(self) -> None:
        super()._go_on()
        if self._local.task is not None:
            self._local.task.check()

    def _interact(self, pool: Any, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        try:
            return super()._interact(pool, work, args)
        finally:
            self._local.task = None

    def _released(self, pool: Any, conn: Connection) -> None:
        if not (isinstance(conn, PlanningConnection) and conn.make_clean()):
            pool.disconnect(conn)

    def _commit(self, conn: Connection) -> None:
        # Deferred triggers run in it, and no timeout of the database covers them.
        task = cast("Task", self._local.task)
        task.enter(f"the COMMIT of {task.name}", task.subject)
        try:
            super()._commit(conn)
        except psycopg2.Error as error:
            # PostgreSQL has rolled back what it tells of as cancelled.
            if task.is_late and error.pgcode == _QUERY_CANCELED:
                raise self._too_late() from None
            raise
        finally:
            task.leave()

    @contextmanager
    def foreign(self, txn: Cursor, name: str, subject: Any = None) -> Iterator[Cursor]:
        """Call foreign code inside: in a savepoint, within the deadline, on a plain cursor of the same transaction.

        The transaction has its role and its settings again afterwards.

        :param name: names the call to people.
        :param subject: what it works on, for who handles :class:`HandlerStuck`.
        :raises HandlerTimeout: it took too long.
        """
        task, conn = cast("Task", self._local.task), cast("PlanningConnection", txn.connection)
        with self._without_plans(txn), savepoint(txn, "" if task.name else _NEVER_PREPARED, _OWN_PATH):
            task.enter(name, subject)
            conn.is_foreign = True
            cursor = plain(txn)
            pid = os.getpid()
            try:
                yield cursor
            except BaseException as error:
                describe(error)
                if task.is_late:
                    raise self._too_late() from None
                raise
            finally:
                took_s = task.running_s()
                if os.getpid() != pid:
                    # A fork of the code's. It shares our connections, and must not go on as a copy of us.
                    os._exit(_FORKED)
                conn.is_foreign = False
                # A callback for the whole process, such as gevent's, would run under our own statements, too.
                set_wait_callback(None)
                conn.close_foreign_cursors()
                if took_s > _LARGE_S:
                    self._memory.check()
                task.leave()
            if task.is_late:
                raise self._too_late()
            # A transaction that was made read-only refuses the first of these.
            txn.execute(f"set transaction read write; {conn.restore()}")

    @contextmanager
    def _without_plans(self, txn: Cursor) -> Iterator[None]:
        """Remove the prepared statements of a call that fails: the end of its savepoint leaves them."""
        try:
            yield
        except BaseException:
            if is_in_transaction(txn):
                with suppress(psycopg2.Error):
                    txn.execute("deallocate all")
            raise

    def _too_late(self) -> HandlerTimeout:
        return HandlerTimeout(f"it took longer than {self.timeout_s:g} s: see --handler-timeout")

    def _prepare(self, conn: Connection) -> None:
        super()._prepare(conn)
        with conn.cursor(cursor_factory=StoreCursor) as txn:
            # From the first LISTEN of a session on, each UNLISTEN counts.
            txn.execute("listen s2s; unlisten s2s")
        conn.commit()
        cast("PlanningConnection", conn).owner = threading.get_ident()

    # --- the pool ----------------------------------------------------------------------------------------------------

    def _make_pool(self) -> Any:
        pool = super()._make_pool()
        # Daemons: the end of the process does not wait for a stuck one.
        pool.threadpool.threadFactory = partial(own_threads.Thread, daemon=True)
        return pool

    def _close(self) -> None:
        cancel(self._watching)
        for conn in [] if self._pool is None else list(self._pool.connections.values()):
            # Closed in the reactor's thread.
            conn.owner = None
        if not self.stuck or self._pool is None:
            super()._close()
            return
        self._silence.stop()
        # To stop the pool would be to wait for its stuck threads.
        pool, self._pool = self._pool, None
        self.reactor.removeSystemEventTrigger(pool.shutdownID)
        held = {id(task.connection) for task in self.stuck}
        for conn in list(pool.connections.values()):
            if id(conn) not in held and not is_broken(conn):
                conn.close()

    def _note(self, error: BaseException) -> None:
        self._owner._note(error)
