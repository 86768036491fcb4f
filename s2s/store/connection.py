"""A psycopg2 connection: the settings that it gets when it opens, and how it is cleaned."""

from __future__ import annotations

import functools
import random
import re
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final
from weakref import WeakSet

import psycopg2
import psycopg2.extras
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, QuotedString, connection, cursor

from s2s.errors import StatementRefused
from s2s.runtime import hooks, own_threads
from s2s.runtime.forks import keep_from_children
from s2s.store.cursor import StoreCursor, read_json

#: Seconds that connecting may take: longer than libpq needs for several addresses of a host.
CONNECT_S: Final = 30.0
#: The most concurrent connects of this process; it has fewer sessions. Connects that hang in a name server count until
#: it answers.
MOST_CONNECTING: Final = 64
_BEYOND_S: Final = 1.0
_ENDED: Final = f"the thread that connects has ended before its work: {hooks.CURE}"
_connecting: Final = threading.Semaphore(MOST_CONNECTING)
_RANDOM: Final = random.SystemRandom()
#: Our statements name our tables with their schema, so that they use no table, function or operator of another schema.
#: PostgreSQL searches the schema of temporary tables first unless it is named, also for types.
SET_PATH: Final = "set search_path = pg_catalog, pg_temp; "


#: The kinds of state that neither DISCARD ALL nor the end of a transaction removes: whether the user may reset a
#: replication origin, whether the user may make replication slots, and the schema of dblink.
_STATE: Final = """
select
    pg_catalog.has_function_privilege('pg_catalog.pg_replication_origin_session_is_setup()', 'execute')
    and pg_catalog.has_function_privilege('pg_catalog.pg_replication_origin_session_reset()', 'execute'),
    r.rolreplication or r.rolsuper, pg_catalog.quote_ident(n.nspname)
from pg_catalog.pg_roles r
left join pg_catalog.pg_extension e on e.extname = 'dblink'
left join pg_catalog.pg_namespace n on n.oid = e.extnamespace
where r.rolname = current_user
"""
#: Seconds between two looks at these kinds: the owner of the database may create or move dblink at any time.
_STATE_S: Final = 1.0
_RESET_ORIGIN: Final = (
    "case when pg_catalog.pg_replication_origin_session_is_setup()"
    " then pg_catalog.pg_replication_origin_session_reset() end"
)
#: The process number of the session that uses each replication slot. Other forms of this query take 50 µs longer.
_SLOTS: Final = "select (pg_catalog.pg_get_replication_slots()).active_pid"
#: Only an error shows that there is no connection without a name.
_DISCONNECT: Final = (
    "do language plpgsql $s2s$ declare each text; begin"
    " for each in select pg_catalog.unnest({schema}.dblink_get_connections()) loop"
    " perform {schema}.dblink_disconnect(each); end loop;"
    " begin perform {schema}.dblink_disconnect(); exception when others then null; end;"
    " end $s2s$; "
)

_made: WeakSet[PlanningConnection] = WeakSet()


def _descriptors() -> Iterator[int]:
    for conn in list(_made):
        with suppress(psycopg2.Error):
            yield conn.fileno()


keep_from_children(_descriptors)


class PlanningConnection(connection):
    """A connection that records the statements that it has planned; :func:`parameters` makes all our connections so.

    :ivar plans: the planned statements.
    :ivar is_foreign: foreign code uses the connection now and may not end its transaction.
    :ivar owner: the identifier of the only thread that may use the connection; ``None``: any thread may.
    :ivar session: the process number and start time of the backend; ``None``: not known yet.
    :ivar asked_at: when the statement of ours that has no answer yet was sent, in monotonic seconds; ``None``: there is
        none. See :mod:`s2s.store.silence`.
    :ivar kept: the reports of the transaction about rows that were not written: :mod:`s2s.store.kept_rows`.
    :ivar is_suspect: SQL of foreign code has failed: state that an extension keeps for the session may be the cause.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_foreign = False
        self.asked_at: float | None = None
        self.owner: int | None = None
        self.kept: list[StatementRefused] = []
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            # The traceback references this object, and libpq keeps the socket of a refused connection open.
            self.close()
            raise
        _made.add(self)
        self.plans: set[Any] = set()
        self.is_suspect = False
        self._restore = self._sets = ""
        self._forget, self._slots = "select null", ""
        self._state: list[tuple[Any, ...]] = []
        self._state_at = float("inf")
        self.session: tuple[int, str] | None = None
        self._foreign_cursors: WeakSet[Any] = WeakSet()
        self._attributes: tuple[Any, ...] = ()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """Return a cursor; see :meth:`_check_owner`."""
        self._check_owner()
        if not self.is_foreign:
            return super().cursor(*args, **kwargs)
        options = {**dict(zip(("name", "cursor_factory", "withhold", "scrollable"), args, strict=False)), **kwargs}
        default: Any = self.cursor_factory
        factory = options.get("cursor_factory") or default or cursor
        options["cursor_factory"] = _owned(factory) if isinstance(factory, type) else factory
        made = super().cursor(**options)
        self._foreign_cursors.add(made)
        return made

    def close_foreign_cursors(self) -> None:
        """Close the cursors of foreign code, which could otherwise use them in later transactions."""
        for each in list(self._foreign_cursors):
            # Closing a named cursor fails in a transaction that has failed.
            with suppress(psycopg2.Error):
                each.close()
        self._foreign_cursors.clear()

    def _check_ours(self) -> None:
        """Prevent foreign code from ending a transaction that also contains the work of other code.

        :raises psycopg2.ProgrammingError: foreign code uses this connection now, or a thread that it has started does.
        """
        self._check_owner()
        if self.is_foreign:
            raise psycopg2.ProgrammingError(
                "a handler, a job or an order never commits or rolls back, and never closes its connection"
            )

    def _check_owner(self) -> None:
        """Prevent a thread that foreign code has started from using the transactions of other code."""
        if self.owner is not None and self.owner != threading.get_ident():
            raise psycopg2.ProgrammingError("only the thread of a handler, a job or an order may use its connection")

    def remember(self, changed: Iterable[tuple[str, str]], session: tuple[int, str]) -> None:
        """Record the present state of the connection as the clean one.

        :param changed: the rows of :func:`baseline`.
        :param session: the row of ``_SESSION``.
        """
        self.session = session
        self._sets = "".join(
            f", pg_catalog.set_config('{name}', {_quote(value, self)}, false)" for name, value in changed
        )
        self._restore = (
            "reset session authorization; reset role; reset all; close all; deallocate all; discard temp;"
            f" discard sequences; {SET_PATH}"
        )
        self._attributes = self._look()

    def look_for_state(self, txn: Any) -> None:
        """Find the kinds of state that DISCARD ALL leaves on this session, for :meth:`forget`."""
        txn.execute(_STATE)
        self._state, self._state_at = txn.fetchall(), time.monotonic()
        [(may_reset, may_slot, schema)] = self._state
        disconnect = _DISCONNECT.format(schema=schema) if schema else ""
        self._forget = f"{disconnect}select {_RESET_ORIGIN if may_reset else 'null'}"
        self._slots = f"; {_SLOTS}" if may_slot else ""

    def forget(self) -> str:
        """Return the statements that remove the state that neither a rollback nor DISCARD ALL removes."""
        return f"deallocate all; {SET_PATH}{self._forget}"

    def restore(self) -> str:
        """Return the statements that undo, inside a transaction, each change of a setting and of the role.

        They also drop the cursors, prepared statements and temporary tables, whose names the next call may use, and
        reset ``lastval()`` and ``currval()``. They set a random seed, because the effect of ``setseed()`` outlives even
        DISCARD ALL, as do a replication origin and connections of dblink.
        """
        return f"{self._restore}{self._forget}, pg_catalog.setseed({_RANDOM.uniform(-1.0, 1.0)!r}){self._sets}"

    def make_clean(self) -> bool:
        """Undo every change that code in the last transaction may have left on the session.

        :returns: ``False``: the connection cannot be cleaned and must be closed.
        """
        if not self._restore or self.is_suspect or self._look() != self._attributes:
            return False
        self.plans.clear()
        self.notifies.clear()
        try:
            self.autocommit = True
            with self.cursor(cursor_factory=StoreCursor) as txn:
                txn.execute("discard all")
                txn.execute(f"{self.restore()}{self._slots}")
                # Only the end of a session releases a slot that it has made as a temporary one.
                is_clean = not self._slots or self.session is None or (self.session[0],) not in txn.fetchall()
                if time.monotonic() >= self._state_at + _STATE_S:
                    before = self._state
                    self.look_for_state(txn)
                    is_clean = is_clean and self._state == before
            self.autocommit = False
        except psycopg2.Error:
            return False
        return is_clean

    def _look(self) -> tuple[Any, ...]:
        """Return the attributes that psycopg2 keeps for a connection and that code may change."""
        casters = (dict(self.string_types), dict(self.binary_types))
        modes = (self.autocommit, self.isolation_level, self.readonly, self.deferrable)
        return (self.cursor_factory, self.encoding, *modes, *casters)


def _guarded(name: str) -> Callable[..., Any]:
    """Return a method of psycopg2's connection that foreign code may not call; see ``_check_ours``."""
    method = getattr(connection, name)

    @functools.wraps(method)
    def call(self: PlanningConnection, *args: Any, **kwargs: Any) -> Any:
        self._check_ours()
        self.asked_at = time.monotonic()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.asked_at = None

    return call


@functools.lru_cache(maxsize=64)
def _owned(factory: type) -> type:
    """Return a cursor class whose statements fail in a thread that does not own the connection."""

    def guarded(name: str) -> Callable[..., Any]:
        method = getattr(factory, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.connection._check_owner()
            return method(self, *args, **kwargs)

        return call

    return type(factory.__name__, (factory,), {name: guarded(name) for name in _STATEMENTS})


#: The methods of psycopg2's cursor that send a statement.
_STATEMENTS: Final = ("execute", "executemany", "callproc", "copy_from", "copy_to", "copy_expert")

# Each of these methods ends the transaction or the connection.
for _name in ("commit", "rollback", "reset", "close", "cancel", "set_isolation_level", "set_client_encoding"):
    setattr(PlanningConnection, _name, _guarded(_name))


#: The process number and the start time of this connection's backend: code may change the name of its session. Behind a
#: pooler, the process number that libpq reports is the pooler's. A user with a default role may not be allowed to see
#: when its session began.
_SESSION: Final = (
    "set local role none;"
    " select pid, backend_start::text from pg_catalog.pg_stat_activity where pid = pg_catalog.pg_backend_pid()"
)


def _quote(text: str, conn: connection) -> str:
    literal = QuotedString(text)
    literal.prepare(conn)
    return literal.getquoted().decode()


def join_within(within_s: float) -> Callable[[threading.Thread], None]:
    """Return a function that waits for the end of a thread.

    :param within_s: seconds after which the function raises :class:`psycopg2.OperationalError`.
    """

    def join(thread: threading.Thread) -> None:
        thread.join(within_s)
        if thread.is_alive():
            raise psycopg2.OperationalError(
                f"no connection within {within_s:g} s: see the name server, the host and the network"
            )

    return join


def connect(
    parameters: Mapping[str, Any], join: Callable[[threading.Thread], object] | None = None
) -> PlanningConnection:
    """Connect. Blocks, for :data:`CONNECT_S` at most.

    :param parameters: the parameters of ``psycopg2.connect``.
    :param join: waits for the connecting thread, see :func:`_in_time`.
    """

    def opening() -> PlanningConnection:
        conn: PlanningConnection = psycopg2.connect(**parameters)
        if _misreads_literals(conn):
            conn = psycopg2.connect(**_with_plain_literals(parameters, conn))
        return conn

    return _in_time(opening, join or join_within(CONNECT_S))


def _in_time(
    opening: Callable[[], PlanningConnection], join: Callable[[threading.Thread], object]
) -> PlanningConnection:
    """Connect in a thread of its own, because libpq's lookup of a host name has no time limit.

    :param join: waits for the thread; if it raises, a connection that opens later is closed.
    """
    came: list[PlanningConnection | BaseException] = []
    places = [1]
    lock, is_over = threading.Lock(), False

    def leave() -> None:
        # A hook of foreign code may end the thread before it comes here, so the caller leaves as well.
        with suppress(IndexError):
            places.pop()
            _connecting.release()

    def in_thread() -> None:
        outcome: PlanningConnection | BaseException
        try:
            outcome = opening()
        except BaseException as error:
            outcome = error
        finally:
            leave()
        with lock:
            came.append(outcome)
            if is_over:
                close()

    def close() -> None:
        for each in came:
            if isinstance(each, connection):
                each.close()

    if not _connecting.acquire(blocking=False):
        raise psycopg2.OperationalError(f"{MOST_CONNECTING} connects do not end: see the name server of this machine")
    try:
        thread = threading.Thread(target=in_thread, daemon=True)
    except RuntimeError:  # threading.excepthook is None
        leave()
        raise psycopg2.OperationalError(_ENDED) from None
    if not own_threads.try_start(thread):
        leave()
        return opening()
    try:
        join(thread)
    except BaseException:
        with lock:
            is_over = True
            close()
        raise
    if not came:
        leave()
        raise psycopg2.OperationalError(_ENDED)
    [outcome] = came
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _misreads_literals(conn: connection) -> bool:
    """Whether psycopg2 escapes backslashes in literals in a way that a session set up by :func:`baseline` misreads.

    psycopg2 reads the setting once, when it connects. A parameter with a backslash could then end its own literal.
    """
    return bool(conn.info.parameter_status("standard_conforming_strings") == "off")


def _with_plain_literals(parameters: Mapping[str, Any], conn: connection) -> dict[str, Any]:
    """Close a connection for which :func:`_misreads_literals` is true, and return the parameters of the next one."""
    options = conn.info.options
    conn.close()
    return {**parameters, "options": f"{options} -c standard_conforming_strings=on"}


#: The SQLSTATEs with which a default of the user or database ends the first statements, before those of
#: :func:`baseline` are in force.
_ENDED_BY_DEFAULT: Final = ("25P03", "25P04", "55P03", "57014", "57P05")
_LOST: Final = re.compile("FATAL|server closed the connection")
#: Those defaults, by the first version of PostgreSQL that has them.
_TIMEOUTS: Final = {
    "statement_timeout": 0,
    "lock_timeout": 0,
    "idle_in_transaction_session_timeout": 0,
    "idle_session_timeout": 140_000,
    "transaction_timeout": 170_000,
}


def open_prepared(
    parameters: Mapping[str, Any],
    open_: Callable[[Mapping[str, Any]], PlanningConnection],
    prepare: Callable[[PlanningConnection], object],
) -> PlanningConnection:
    """Open and prepare a connection, a second time without timeouts if a default timeout ends the first statements.

    The timeouts are not passed at once: a pooler may refuse options.

    :param open_: opens a connection.
    :param prepare: runs the first statements.
    """
    conn = open_(parameters)
    options, version = conn.info.options, conn.server_version
    try:
        prepare(conn)
    except BaseException as error:
        conn.close()
        if not _is_by_default(error):
            raise
        off = " ".join(f"-c {name}=0" for name, since in _TIMEOUTS.items() if version >= since)
        try:
            conn = open_({**parameters, "options": f"{options} {off}"})
        except psycopg2.Error:
            raise error from None
        try:
            prepare(conn)
        except BaseException:
            conn.close()
            raise
    return conn


def _is_by_default(error: BaseException) -> bool:
    """Whether a default timeout may have ended a statement or the session: libpq may report that without a SQLSTATE."""
    if not isinstance(error, psycopg2.Error):
        return False
    return error.pgcode in _ENDED_BY_DEFAULT if error.pgcode else bool(_LOST.search(str(error)))


def prepare(conn: connection, statement_timeout_s: float, idle_timeout_s: float) -> None:
    """Set up the session of a new connection, as every transaction requires.

    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param idle_timeout_s: seconds after which the database ends an idle transaction.
    :raises psycopg2.OperationalError: literals would be misread, see :func:`connect`.
    """
    _check_literals(conn)
    psycopg2.extras.register_default_jsonb(conn, loads=read_json)
    with conn.cursor(cursor_factory=StoreCursor) as txn:
        statement = baseline(statement_timeout_s, idle_timeout_s)
        try:
            txn.execute(statement)
        except psycopg2.errors.InsufficientPrivilege:
            conn.rollback()
            txn.execute(_DENIED)
            _refuse_settings(txn.fetchall())
            raise
        changed = txn.fetchall()
        txn.execute(_SESSION)
        [session] = txn.fetchall()
    conn.commit()
    if isinstance(conn, PlanningConnection):
        conn.remember(changed, session)


def _check_literals(conn: connection) -> None:
    if _misreads_literals(conn):
        raise psycopg2.OperationalError(
            "standard_conforming_strings is off, and an option of the connection does not change it: run"
            " alter role USER set standard_conforming_strings = on"
        )


#: Settings that our statements require, whatever the defaults of the server, the database and the user are.
_SETTINGS: Final = {
    "array_nulls": "on",
    "bytea_output": "hex",
    # At a lower level, notices of the server would be written to our stderr without a limit.
    "client_min_messages": "warning",
    "DateStyle": "ISO, MDY",
    "default_transaction_deferrable": "off",
    "default_transaction_isolation": "read committed",
    # An error would end the session, and libpq would report the end without the reason.
    "exit_on_error": "off",
    "extra_float_digits": "1",
    "idle_session_timeout": "0",
    "IntervalStyle": "postgres",
    "lock_timeout": "0",
    "quote_all_identifiers": "off",
    "session_replication_role": "origin",
    "standard_conforming_strings": "on",
    "synchronous_commit": "on",
    "TimeZone": "UTC",
    "transaction_timeout": "0",
    "transform_null_equals": "off",
}


class SettingDenied(psycopg2.OperationalError):
    """A default of the user or database contradicts a setting that we need, and only a superuser may change it."""

    pgcode = "42501 setting"


#: SQL for the settings whose defaults are wrong and that only a superuser may change for a session, with their sources.
_DENIED: Final = (
    f"{SET_PATH}select s.name, w.value, s.source, pg_catalog.quote_ident(current_user),"  # noqa: S608 - of constants
    " pg_catalog.quote_ident(pg_catalog.current_database())"
    f" from (values {', '.join(str((name, value)) for name, value in _SETTINGS.items())}) as w (name, value)"
    " join pg_catalog.pg_settings s using (name)"
    " where s.setting <> w.value and s.context in ('superuser', 'superuser-backend')"
)
_RESETS: Final = {
    "user": "alter role {user} reset {name}",
    "database": "alter database {database} reset {name}",
    "database user": "alter role {user} in database {database} reset {name}",
    "global": "alter role all reset {name}",
}


def _refuse_settings(denied: Iterable[tuple[str, str, str, str, str]]) -> None:
    """Raise an error that names a wrong setting and the statement that fixes it.

    :param denied: the rows of :data:`_DENIED`.
    :raises SettingDenied: there is such a setting.
    """
    for name, value, source, user, database in denied:
        reset = _RESETS.get(source, "alter system reset {name}; select pg_reload_conf()")
        cure = reset.format(user=user, database=database, name=name)
        raise SettingDenied(f"{user} may not set {name} to {value}, and its default is another one: run {cure}")


def baseline(statement_timeout_s: float, idle_timeout_s: float = 60.0) -> str:
    """Return the statement that sets the settings that every transaction requires; see :func:`prepare`.

    Its rows are the names and values of the settings that it changed. It omits settings that this version of PostgreSQL
    lacks. ``default_transaction_read_only`` keeps the value that the database's owner set.
    """
    wanted = {
        **_SETTINGS,
        "statement_timeout": str(round(statement_timeout_s * 1000)),
        "idle_in_transaction_session_timeout": str(round(idle_timeout_s * 1000)),
    }
    values = ", ".join(f"('{name}', '{value}')" for name, value in wanted.items())
    return (
        f"{SET_PATH}select s.name, pg_catalog.set_config(s.name, w.value, false)"  # noqa: S608 - of constants
        f" from (values {values}) as w (name, value)"
        " join pg_catalog.pg_settings s using (name) where s.setting <> w.value"
        # Keep a stronger guarantee than ours.
        " and not (s.name = 'synchronous_commit' and s.setting = 'remote_apply')"
    )


def open_async(
    parameters: Callable[[], Mapping[str, Any]], within_s: float, statement_timeout_s: float, statement: str = ""
) -> PlanningConnection:
    """Connect, apply :func:`baseline`, and run a first statement. Blocks; then the connection is asynchronous.

    :param parameters: returns the connection parameters; it may block.
    :param within_s: seconds that everything may take.
    :param statement_timeout_s: seconds after which the database cancels a statement; 0: never.
    """
    opening = functools.partial(_open_async, parameters, within_s, statement_timeout_s, statement)
    # The wait for an answer has a more specific error, so it must end before this one.
    return _in_time(opening, join_within(within_s + _BEYOND_S))


def _open_async(
    parameters: Callable[[], Mapping[str, Any]], within_s: float, statement_timeout_s: float, statement: str
) -> PlanningConnection:
    deadline = time.monotonic() + within_s

    def open_(given: Mapping[str, Any]) -> PlanningConnection:
        conn: PlanningConnection = psycopg2.connect(**given, async_=True)
        try:
            _settle(conn, deadline, within_s)
            if _misreads_literals(conn):
                conn = psycopg2.connect(**_with_plain_literals(given, conn), async_=True)
                _settle(conn, deadline, within_s)
                _check_literals(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def prepare(conn: PlanningConnection) -> None:
        for text in (statement, baseline(statement_timeout_s), _SESSION):
            if text:
                cursor = conn.cursor(cursor_factory=StoreCursor)  # keep a reference: the connection keeps none
                try:
                    cursor.execute(text)
                    _settle(conn, deadline, within_s)
                except psycopg2.errors.InsufficientPrivilege:
                    cursor.execute(_DENIED)
                    _settle(conn, deadline, within_s)
                    _refuse_settings(cursor.fetchall())
                    raise
        [conn.session] = cursor.fetchall()

    return open_prepared(parameters(), open_, prepare)


def _settle(conn: connection, deadline: float, within_s: float) -> None:
    """Wait until an asynchronous connection has completed its current operation.

    :param deadline: on the monotonic clock.
    """
    events = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}
    while (state := conn.poll()) != POLL_OK:
        ready = select.poll()
        ready.register(conn.fileno(), events[state])
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not ready.poll(left_s * 1000):
            raise psycopg2.OperationalError(f"no answer within {within_s:g} s")
