"""The HTTP API of one server, which starts and stops with the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final

from s2s.admin.http.api import Api, Plain
from s2s.admin.http.long_polls import LongPolls
from s2s.admin.http.openapi import document
from s2s.admin.http.operation_runner import THREADS, OperationRunner
from s2s.admin.http.problems import Problem
from s2s.admin.http.sign_in import SignIn
from s2s.admin.http.site import make_site
from s2s.admin.operations import all_operations
from s2s.admin.operations.operation import members
from s2s.errors import NotReady
from s2s.handlers.discovery import Found
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store.pool import Database
from s2s.store.tables import control_requests, orders, tokens

#: Connections of the pool that the API needs: those of the requests, and one to poll for the rows that requests await.
POOL_THREADS: Final = sum(THREADS.values()) + 1
#: The readiness text of a part of the server that works, or that is switched off, begins with one of these.
WELL: Final = ("ok", "off")

_TEXT: Final = {"type": "string"}


class Web:
    """The HTTP side of a server.

    :param readiness: returns the readiness text of each part of the server that must work, see :data:`WELL`.
    :param hosts: further host names that clients may use for this server.
    :param plugins: the plug-ins, whose orders and reports the API serves.
    :ivar site: the factory of its connections.
    :ivar on_notify: the function to call when a channel of the database is notified, by channel.
    :ivar counts: the number of requests by outcome.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        counters: Counters,
        readiness: Callable[[], Awaitable[Mapping[str, str]]],
        hosts: Collection[str] = (),
        plugins: Found = Found(),  # noqa: B008 - it is immutable
    ) -> None:
        self._readiness = readiness
        self._waiting = LongPolls(database, clock, counters)
        self._sign_in = SignIn(database, clock, counters)
        plain = (
            Plain("healthz", "/healthz", "Whether the process is alive", _HEALTH, self._healthz, True),
            Plain("readyz", "/readyz", "Whether the database and the executor serve", _READINESS, self._readyz, True),
            Plain("openapi", "/openapi.json", "This document", {"type": "object"}, self._openapi),
        )
        served = all_operations(plugins)
        self._document = document(served, plain)
        runner = OperationRunner(database, clock, self._waiting, counters)
        self._api = Api(runner, self._sign_in, served, plain, hosts)
        self.counts = self._api.counts
        self.site = make_site(self._api, clock, counters, self._sign_in.knows, self._api.body_bytes)
        self.on_notify = {
            tokens.CHANNEL: self._sign_in.notify,
            orders.OVER_CHANNEL: self._waiting.wake,
            control_requests.OVER_CHANNEL: self._waiting.wake,
        }

    def start(self) -> None:
        """Start to serve requests."""
        self._sign_in.start()
        self._waiting.start()

    async def stop(self) -> None:
        """Answer the requests under way, end the long polls with the current state, and close all connections."""
        draining = self._api.drain()
        await self._waiting.stop()
        await draining
        self._sign_in.stop()
        await self.site.close()

    async def _healthz(self, _: bool) -> dict[str, str]:
        return {"status": "ok"}

    async def _readyz(self, is_known: bool) -> dict[str, Any]:
        parts = dict(await self._readiness())
        if not is_known:
            # A client without a valid token learns which part is not ready, but not why.
            parts = {part: next(filter(said.startswith, WELL), "not ready") for part, said in parts.items()}
        if not all(said.startswith(WELL) for said in parts.values()):
            why = ", ".join(f"{part}: {said}" for part, said in parts.items() if not said.startswith(WELL))
            # Not 409, because the request is not at fault.
            raise Problem(NotReady(f"the server is not ready: {why}", retry_after_ms=1000, **parts), 503)
        return {"status": "ready", **parts}

    async def _openapi(self, _: bool) -> dict[str, Any]:
        return self._document


_HEALTH: Final = members({"status": {"const": "ok"}}, "status")
_READINESS: Final = members(
    {"status": {"const": "ready"}, "database": _TEXT, "pushes": _TEXT, "executor": _TEXT},
    *("status", "database", "pushes", "executor"),
)
