"""Where the command line executes operations: at a server's HTTP API, or in the database itself.

Both execute the same operations (:mod:`s2s.admin.operations`) with the same effect on the rows.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource
from twisted.internet.threads import blockingCallFromThread

from s2s.admin.client import AdminClient
from s2s.admin.operations.operation import (
    Operation,
    OperationReply,
    OperationRequest,
    OperationSteps,
    WaitFor,
    advance,
    drop_none,
    perform,
)
from s2s.admin.operations.pages import MOST_ROWS, Page
from s2s.cli.common import FilledPath, actor, database_options, not_empty, one_line_errors, transaction
from s2s.cli.up.supervisor import Api, find_api
from s2s.errors import AuthBad, AuthRequired, OperatorError, Refused, Unreachable, WireError, harmless
from s2s.roles import preflight
from s2s.runtime import files, own_threads
from s2s.runtime.clock import make_monotonic
from s2s.runtime.streams import LATE_S
from s2s.store import driver, pool
from s2s.store.driver import Cursor
from s2s.store.lock_wait import PATIENCE_S, LockWait

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
T = TypeVar("T")

URL_VARIABLE: Final = "S2S_URL"
TOKEN_VARIABLE: Final = "S2S_TOKEN_FILE"
#: Seconds between two checks of a wait.
_LOOK_S: Final = 0.05


class Backend(ABC):
    """Executes operations."""

    def call(
        self,
        operation: Operation[R],
        *,
        path_params: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        idem_key: str | None = None,
    ) -> R:
        """Execute an operation; members of its query and body that are ``None`` are omitted.

        :raises Refused: the operation is refused.
        :raises S2SError: the operation fails.
        """
        return self._perform(
            operation,
            OperationRequest(actor(), "admin", path_params or {}, drop_none(query), drop_none(body), idem_key),
        )

    @abstractmethod
    def _perform(self, operation: Operation[R], ask: OperationRequest) -> R:
        """Execute an operation."""


class DatabaseBackend(Backend):
    """Executes operations itself, on one connection."""

    def __init__(self, txn: Cursor) -> None:
        self._txn = txn
        # The connection has recorded the actor. Commit, so that a step that fails does not undo that.
        driver.commit(txn.connection)

    def _perform(self, operation: Operation[R], ask: OperationRequest) -> R:
        locks = LockWait(self._txn.connection, partial(click.echo, err=True), PATIENCE_S) if operation.is_list else None
        try:
            with locks.watched() if locks else nullcontext():
                return self._take(perform(operation, ask), locks).value
        except WireError as error:
            raise Refused(error.code, error.message, error.payload()["details"]) from None

    def _take(self, steps: OperationSteps[R], locks: LockWait | None) -> OperationReply[R]:
        """Run the steps of an operation.

        :param locks: bounds each wait of a list for a lock, and retries it; ``None``: the operation is no list.
        """
        came: Any = None
        failed: Exception | None = None
        while not isinstance(step := advance(steps, came, failed), OperationReply):
            came = failed = None
            try:
                if isinstance(step, WaitFor):
                    self._wait(step)
                elif locks is not None:
                    came = pool.step(self._txn, partial(_unlocked, locks, step))
                else:
                    came = pool.step(self._txn, step)
            except Exception as error:
                failed = error
        return step

    def _wait(self, until: WaitFor) -> None:
        deadline = time.monotonic() + until.seconds
        left = set(until.ids)
        while True:
            left -= set(pool.step(self._txn, partial(_look, until, left)))
            if not left or time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_S)


def _unlocked(locks: LockWait, work: Callable[[Cursor], T], _: Cursor) -> T:
    return locks.run(work)


def _look(until: WaitFor, ids: Collection[Any], txn: Cursor) -> Collection[Any]:
    return until.look(txn, list(ids))


class HttpBackend(Backend):
    """Executes operations at a server; the actor is the token's."""

    def __init__(self, api: Api) -> None:
        self._reactor = _running_reactor()
        self._api = api
        self._token = _read_token(api.token_file)
        self._client = AdminClient(api.url, self._token)

    def _perform(self, operation: Operation[R], ask: OperationRequest) -> R:
        call: Any = partial(
            self._client.call,
            operation,
            path_params=ask.path_params,
            query=ask.query,
            body=ask.body,
            idem_key=ask.idem_key,
        )
        late = threading.Timer(LATE_S, click.echo, (f"waiting for the answer of {self._api.url}",), {"err": True})
        late.daemon = True
        own_threads.try_start(late)
        try:
            reply: R = blockingCallFromThread(self._reactor, call)
            return reply
        except Refused as error:
            if error.code not in (AuthBad.code, AuthRequired.code):
                raise
            if not self._has_new_token():
                raise OperatorError(f"{error.message}: see --token-file and {TOKEN_VARIABLE}") from None
        finally:
            late.cancel()
        return self._perform(operation, ask)

    def _has_new_token(self) -> bool:
        """Read the token again: it may have been replaced while the command waited for an order."""
        token = _read_token(self._api.token_file)
        if token == self._token:
            return False
        self.close()
        self._token, self._client = token, AdminClient(self._api.url, token)
        return True

    def close(self) -> None:
        """Close the connections."""
        blockingCallFromThread(self._reactor, self._client.close)


@functools.cache
def _running_reactor() -> Any:
    """Return the reactor, which runs in a thread of its own because all code here blocks. It ends with the process."""
    from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

    loop: Any = reactor
    if not loop.running:
        make_monotonic(loop)
        is_running = threading.Event()
        loop.callWhenRunning(is_running.set)
        threading.Thread(target=loop.run, kwargs={"installSignalHandlers": False}, daemon=True).start()
        is_running.wait()
    return loop


def _read_token(path: Path) -> str:
    token = files.read_line(path, "the token file", ": see --token-file")
    if not (token and token.isascii() and token.isprintable()):
        raise OperatorError(f"the token file has no token: {path}: see --token-file")
    return token


def rows(
    backend: Backend, operation: Operation[Page[T]], limit: int, *, before: int | str | None = None, **filters: Any
) -> list[T]:
    """Return up to ``limit`` rows of a list, from as many pages as necessary.

    :param before: only rows that follow this one in the list.
    """
    found: list[T] = []
    cursor = None if before is None else str(before)
    while len(found) < limit:
        wanted = min(limit - len(found), MOST_ROWS)
        try:
            page = backend.call(operation, query={**filters, "limit": wanted, "cursor": cursor})
        except Refused as error:
            if before is None or error.details.get("path") != "/query/cursor":
                raise
            raise OperatorError(f"--before {harmless(str(before))}: take it from a list that is newer") from None
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


# --- selecting the backend -------------------------------------------------------------------------------------------


def with_backend(function: F) -> F:
    """Pass a ``backend`` to a command, add the options that select it, and report a failure in one line."""

    @one_line_errors
    @functools.wraps(function)
    def wrapped(
        *args: Any, url: str | None, token_file: Path | None, database: str | None, state_dir: Path, **options: Any
    ) -> Any:
        try:
            with _open(url, token_file, database, state_dir) as backend:
                return function(*args, backend=backend, **options)
        except Unreachable as error:
            cure = f"see --url and {URL_VARIABLE}, or name --database to go without the server"
            raise OperatorError(f"{error}: {cure}") from None

    for option in (
        click.option(
            "--token-file",
            type=FilledPath(dir_okay=False, path_type=Path),
            envvar=TOKEN_VARIABLE,
            callback=not_empty,
            help=f"File with the token for --url; else {TOKEN_VARIABLE}.",
        ),
        click.option(
            "--url",
            envvar=URL_VARIABLE,
            callback=not_empty,
            metavar="URL",
            help=f"A server's HTTP API; else {URL_VARIABLE}, else the database that is named, else a running s2s up.",
        ),
    ):
        wrapped = option(wrapped)
    return database_options(wrapped)  # type: ignore[return-value]


@contextmanager
def _open(url: str | None, token_file: Path | None, database: str | None, state_dir: Path) -> Iterator[Backend]:
    """Open the selected backend: an option precedes the environment, which precedes a running ``s2s up``."""
    is_typed = click.get_current_context().get_parameter_source("url") is ParameterSource.COMMANDLINE
    if is_typed and database:
        raise OperatorError("--url and --database name two ways: name one of them")
    api = None
    if url and not database:
        if token_file is None:
            raise OperatorError(f"--url needs a token: name its file with --token-file or {TOKEN_VARIABLE}")
        api = Api(url, token_file)
    elif not database and preflight.DATABASE_VARIABLE not in os.environ:
        api = find_api(state_dir)
    if api is None:
        with transaction(database, state_dir) as txn:
            yield DatabaseBackend(txn)
        return
    backend = HttpBackend(api)
    try:
        yield backend
    finally:
        backend.close()
