"""Run foreign code (command handlers, jobs, orders) in transactions, on connections that our own code does not share.

Each call of foreign code has a deadline. After it, the pool cancels the SQL of the call repeatedly, and the call fails
with :class:`HandlerTimeout`. A call that does not return even then is *stuck*: Python cannot end a thread. The pool
abandons that thread and opens another one in its place, up to :data:`MOST_STUCK`. The transaction of a stuck call is
never committed.

Foreign code may leave any state on a session: a role, settings, temporary tables, advisory locks, cursors. After each
call the pool restores the transaction's role and settings. After each transaction it cleans the connection or closes
it. It closes each connection on which a statement of foreign code has failed: no query finds the state that an
extension or a procedural language keeps for a session, and that state may be the cause.
"""

from __future__ import annotations

import os
import sys
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
from s2s.runtime.hooks import SharedHooks
from s2s.runtime.memory import Memory
from s2s.store.connection import PlanningConnection
from s2s.store.connection_socket import shut_down
from s2s.store.cursor import StoreCursor, plain
from s2s.store.driver import Connection, Cursor, is_broken, is_in_transaction, savepoint
from s2s.store.pool import Database

T = TypeVar("T")

#: Seconds that a call of foreign code may take, unless a setting says otherwise.
TIMEOUT_S: Final = 60.0
#: Seconds after the deadline during which the SQL of a call is cancelled, before the call counts as stuck.
PATIENCE_S: Final = 5.0
#: Seconds between two checks of the running calls, and between two cancellations of one call.
_WATCH_S: Final = 0.25
_CANCEL_S: Final = 1.0
#: Delay of a check, in seconds and without use of a CPU, from which on the process counts as suspended: a debugger,
#: ``docker pause`` or a machine without a free core is not the fault of a call.
_STILL_S: Final = 1.0
#: The SQLSTATE of a statement that was cancelled.
_QUERY_CANCELED: Final = "57014"
#: PostgreSQL refuses to PREPARE a transaction that has executed UNLISTEN. If foreign code prepared its transaction, the
#: transaction would keep its locks on other commands for ever, or would be committed after these commands have run once
#: more.
_NEVER_PREPARED: Final = "unlisten *; "
#: Foreign code finds its tables by the search_path of its user and database, not by ours.
_OWN_PATH: Final = "set local search_path to default"
#: Seconds of a call after which the memory of the process is checked: writing some megabytes takes longer.
_LARGE_S: Final = 0.001
#: The exit code of a process that foreign code has forked and that returns into our code.
_FORKED: Final = 70
#: The most stuck threads of a process. Each costs a thread and about 100 kB. At this number no further call begins.
MOST_STUCK: Final = 8


def call(function: Callable[..., T], *args: Any) -> T:
    """Call foreign code in a context of its own, so that its changes, such as a decimal precision, end with it.

    The trace and profile functions of the thread end with it as well.
    """
    trace, profile = sys.gettrace(), sys.getprofile()
    try:
        return Context().run(function, *args)
    finally:
        # Any call of a Python function would run a trace function of foreign code first. A profile function also runs
        # before a function of C, and ends if it raises.
        try:
            sys.setprofile(profile)
        finally:
            sys.settrace(trace)


#: The most running calls that a line names.
_MOST_NAMED: Final = 8


class _Local(threading.local):
    """The current task of each thread."""

    task: Task | None = None


class Task:
    """One transaction that runs foreign code.

    :ivar name: the running or last call, for log lines and errors.
    :ivar subject: the object that the call works on.
    :ivar entered_at: when the running call began, in monotonic seconds; ``None``: no call runs.
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
        #: Held during a cancellation or the termination of the session, so that neither affects a later call.
        self.cancelling = threading.Lock()

    def enter(self, name: str, subject: Any) -> None:
        """Record that a call of foreign code begins. Runs in the task's thread."""
        with self._lock:
            self.name, self.subject, self.is_late, self.entered_at = name, subject, False, time.monotonic()

    def leave(self) -> None:
        """Record that the call of foreign code has returned. Runs in the task's thread.

        :raises DatabaseUnavailable: the thread was abandoned meanwhile.
        """
        with self.cancelling, self._lock:
            self.entered_at = None
        self.check()

    def check(self) -> None:
        """Raise if the transaction was abandoned.

        :raises DatabaseUnavailable: it was abandoned.
        """
        if self.is_abandoned:
            raise DatabaseUnavailable("the call was stuck, and its transaction was abandoned")

    def running_s(self) -> float:
        """Return the seconds since the running call began; 0 if no call runs."""
        since = self.entered_at
        return 0.0 if since is None else time.monotonic() - since

    def stood_still(self, for_s: float) -> None:
        """Subtract the seconds in which the process was suspended from the running call."""
        with self._lock:
            if self.entered_at is not None:
                self.entered_at = min(self.entered_at + for_s, time.monotonic())

    def abandon(self) -> bool:
        """Abandon the thread, unless its call has returned by now."""
        with self._lock:
            self.is_abandoned = self.entered_at is not None
        return self.is_abandoned


class HandlerPool(Database):
    """A pool of connections for foreign code.

    :param owner: the pool of our own statements; this pool shares its URL, counters and log lines.
    :param application_name: the name of the sessions in ``pg_stat_activity``.
    :param threads: concurrent transactions, not counting the stuck ones.
    :param timeout_s: seconds that a call of foreign code may take, with all its SQL.
    :ivar stuck: the tasks whose thread does not return.
    """

    log = Logger()

    def __init__(self, owner: Database, application_name: str, *, threads: int, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(
            owner.url,
            application_name,
            threads=threads,
            # The database enforces a limit as well, which applies while this process is suspended.
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
        self._hooks = SharedHooks()
        self._watching: Timer | None = None
        #: When the last check was, in monotonic seconds and in seconds of the process's CPU time.
        self._watched_at = (0.0, 0.0)

    def run(self, work: Callable[..., T], *args: Any) -> Deferred[T]:
        """Run ``work`` as :meth:`Database.run` does; foreign code is called inside :meth:`foreign`.

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
        """Whether the limit of stuck calls is reached, so that no further call may begin."""
        return len(self.stuck) >= MOST_STUCK

    @property
    def in_hand(self) -> str:
        """The names of the calls that run now, :data:`_MOST_NAMED` at most; empty: none runs."""
        names = [task.name[:200] for task in (*self._tasks, *self.stuck) if task.entered_at is not None]
        more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
        return "; ".join(names[:_MOST_NAMED] + more)

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
        # A call that holds the interpreter uses the CPU meanwhile, so its time counts.
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
        # Another thread replaces the stuck one. When the stuck thread returns, its connection is gone, so the number of
        # connections stays within the number of threads.
        most = max(self._pool.threadpool.max, self._threads + len(self.stuck))
        self._pool.threadpool.adjustPoolsize(maxthreads=most)
        self.counters.meet("handler")
        self._leave(None)
        task.outcome.errback(HandlerStuck(task, task.subject, f"{self._too_late()}, and it does not return"))

    def end(self, task: Task) -> Deferred[Any]:
        """End the session of a stuck task, which releases its locks and rolls back its transaction.

        A thread that has returned meanwhile ends the session itself.

        :returns: fires when the session has ended, or when the database does not answer.
        """
        return self._in_background(self._terminate, task)

    def _in_background(self, work: Callable[..., None], *args: Any) -> Deferred[Any]:
        done = own_threads.run(self.reactor, work, *args)
        return done.addErrback(
            lambda failure: self.log.failure("the SQL of a late handler could not be cancelled", failure)
        )

    # --- in another thread -------------------------------------------------------------------------------------------

    def _cancel_call(self, task: Task, entered_at: float | None) -> None:
        # One cancellation at a time: while the database hangs, each one takes seconds.
        if task.cancelling.acquire(blocking=False):
            try:
                # Cancel only this call, not the one after it.
                if entered_at is not None and task.entered_at == entered_at:
                    self._signal(task, "pg_cancel_backend")
            finally:
                task.cancelling.release()

    def _signal(self, task: Task, function: str) -> None:
        # psycopg2's own cancel() would block the whole interpreter while the database hangs.
        session = getattr(task.connection, "session", None)
        if session is None:
            return
        with suppress(S2SError), self.shutdown_transaction() as txn:
            # Also compare the start: another session may have the same process number by now.
            txn.execute(
                # A default role of our user may not be allowed to see or signal that user's sessions.
                f"set local role none; select {function}(pid)"  # noqa: S608
                " from pg_stat_activity where pid = %s and backend_start = %s",
                session,
            )

    def _terminate(self, task: Task) -> None:
        # Do not close the connection here: a returning thread waits for it.
        with task.cancelling:
            if task.entered_at is None:
                return
            self._signal(task, "pg_terminate_backend")
            shut_down(cast("Connection", task.connection))

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
        # Deferred triggers run in the COMMIT, and no timeout of the database covers them.
        task = cast("Task", self._local.task)
        task.enter(f"the COMMIT of {task.name}", task.subject)
        try:
            super()._commit(conn)
        except psycopg2.Error as error:
            # PostgreSQL has rolled back a transaction whose COMMIT it reports as cancelled.
            if task.is_late and error.pgcode == _QUERY_CANCELED:
                raise self._too_late() from None
            raise
        finally:
            task.leave()

    @contextmanager
    def foreign(self, txn: Cursor, name: str, subject: Any = None) -> Iterator[Cursor]:
        """Call foreign code inside: in a savepoint, within the deadline, on a plain cursor of the same transaction.

        Afterwards the transaction has its own role and settings again.

        :param name: the name of the call for log lines and errors.
        :param subject: the object that the call works on, for the handler of :class:`HandlerStuck`.
        :raises HandlerTimeout: the call took too long.
        """
        task, conn = cast("Task", self._local.task), cast("PlanningConnection", txn.connection)
        with self._forgotten(txn), savepoint(txn, "" if task.name else _NEVER_PREPARED, _OWN_PATH):
            task.enter(name, subject)
            conn.is_foreign = True
            cursor = plain(txn)
            pid = os.getpid()
            try:
                yield cursor
            except BaseException as error:
                describe(error)
                conn.is_suspect |= isinstance(error, psycopg2.Error)
                if task.is_late:
                    raise self._too_late() from None
                raise
            finally:
                took_s = task.running_s()
                if os.getpid() != pid:
                    # Foreign code forked. The copy shares our connections and must not continue as this process.
                    os._exit(_FORKED)
                conn.is_foreign = False
                # A process-wide wait callback, such as gevent's, would also apply to our own statements.
                set_wait_callback(None)
                self._hooks.restore()
                conn.close_foreign_cursors()
                if took_s > _LARGE_S:
                    self._memory.check()
                task.leave()
            if task.is_late:
                raise self._too_late()
            # A transaction that foreign code made read-only refuses the first of these statements.
            txn.execute(f"set transaction read write; {conn.restore()}")

    @contextmanager
    def _forgotten(self, txn: Cursor) -> Iterator[None]:
        """Remove the state of a call that fails and that the rollback of its savepoint keeps."""
        try:
            yield
        except BaseException:
            if is_in_transaction(txn):
                with suppress(psycopg2.Error):
                    txn.execute(cast("PlanningConnection", txn.connection).forget())
            raise

    def _too_late(self) -> HandlerTimeout:
        return HandlerTimeout(f"it took longer than {self.timeout_s:g} s: see --handler-timeout")

    def _prepare(self, conn: Connection) -> None:
        super()._prepare(conn)
        with conn.cursor(cursor_factory=StoreCursor) as txn:
            # From the first LISTEN of a session on, each UNLISTEN takes effect.
            txn.execute("listen s2s; unlisten s2s")
            cast("PlanningConnection", conn).look_for_state(txn)
        conn.commit()
        cast("PlanningConnection", conn).owner = threading.get_ident()

    # --- the pool ----------------------------------------------------------------------------------------------------

    def _make_pool(self) -> Any:
        pool = super()._make_pool()
        # Daemons, so that the end of the process does not wait for a stuck thread.
        pool.threadpool.threadFactory = partial(own_threads.Thread, daemon=True)
        return pool

    def _close(self) -> None:
        cancel(self._watching)
        for conn in [] if self._pool is None else list(self._pool.connections.values()):
            # The reactor thread closes the connection, so lift the restriction to its owner.
            conn.owner = None
        if not self.stuck or self._pool is None:
            super()._close()
            return
        self._silence.stop()
        # Stopping the pool would wait for its stuck threads.
        pool, self._pool = self._pool, None
        self.reactor.removeSystemEventTrigger(pool.shutdownID)
        held = {id(task.connection) for task in self.stuck}
        for conn in list(pool.connections.values()):
            if id(conn) not in held and not is_broken(conn):
                conn.close()

    def _note(self, error: BaseException) -> None:
        self._owner._note(error)
