"""The base of both roles, which starts and stops their components in a fixed order."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.application import service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.errors import BY_CODE, one_line
from s2s.handlers.discovery import Found
from s2s.link.factory import LinkFactory
from s2s.protocol.identity import Identity
from s2s.protocol.limits import Bounds, Counters
from s2s.roles.live_config import LiveConfig
from s2s.roles.live_keys import LiveKeys
from s2s.roles.shutdown import Shutdown, refuse
from s2s.runtime import forks, streams
from s2s.runtime.clock import Clock
from s2s.runtime.status_log import CounterSummary
from s2s.runtime.watchdog import Watchdog
from s2s.store.handler_pool import HandlerPool
from s2s.store.listen import Listener
from s2s.store.monitors.guard_watch import GuardWatch
from s2s.store.monitors.held_rows import TABLES
from s2s.store.monitors.queue_watch import QueueWatch
from s2s.store.monitors.row_watch import RowWatch
from s2s.store.pool import Database
from s2s.store.tables import config, keys

#: The gen-0 threshold of the garbage collector: the number of objects created and not freed before Python looks for
#: cycles. With the default of 700, a full window of pushes, which live as long as a COMMIT takes, would trigger it all
#: the time.
_MADE: Final = 20_000
#: Seconds between two log lines about limits that are reached all the time, which an attacker can cause.
_TOLD_S: Final = 60


@dataclass
class RoleDeps:
    """The dependencies of a role. None of them connects before the role starts.

    :param url: the URL of the database; it may contain a password.
    :param handlers: the connections on which foreign code runs.
    :param live_keys: the keys, read before the start.
    :param live_config: the configuration, read before the start.
    :param plugins: the installed plug-ins.
    """

    identity: Identity
    url: str = field(repr=False)
    clock: Clock
    bounds: Bounds
    counters: Counters
    database: Database
    handlers: HandlerPool
    live_keys: LiveKeys
    live_config: LiveConfig
    shutdown: Shutdown
    plugins: Found


class Role(service.Service, ABC):
    """One process of either role.

    :param on_notify: the function to call for a NOTIFY, by channel, besides those for keys and configuration.
    :ivar factory: creates the links; set by the subclass.
    """

    log = Logger()
    factory: LinkFactory

    def __init__(self, deps: RoleDeps, on_notify: Mapping[str, Callable[[], object]]) -> None:
        self._identity = deps.identity
        self._clock = deps.clock
        self._counters = deps.counters
        self._database = deps.database
        self._handlers = deps.handlers
        self._keys = deps.live_keys
        self._config = deps.live_config
        self._shutdown = deps.shutdown
        self._shutdown.on_grace_expired = self._past_grace
        self._shutdown.in_hand = lambda: self._handlers.in_hand
        self._config.watchers.append(lambda _: self._configure())
        self._listener = Listener(
            deps.url,
            {keys.CHANNEL: self._keys.notify, config.CHANNEL: self._config.notify, **on_notify},
            presence=self._identity.boot_id,
            application_name=f"s2s-{self._identity.role} listen",
        )
        self._rows = RowWatch(self._database, self._clock, TABLES[self._identity.role])
        self._guards = GuardWatch(self._database, self._clock)
        self._watches = [QueueWatch(self._database, self._clock), self._rows, self._guards]
        self._watchdog = Watchdog(self._clock.scheduler, lambda: self._shutdown.is_asked)
        self._summaries = [
            CounterSummary("bounds met", lambda: self._counters.met, self._clock, longest_s=_TOLD_S),
            CounterSummary("refused", self._passing, self._clock, longest_s=_TOLD_S),
        ]

    def startService(self) -> None:
        """Start all components. A mistake of the operator ends the process before any of them runs."""
        self._shutdown.watch()
        streams.bound_lines()
        # After twistd itself has forked.
        forks.watch()
        reactor = self._database.reactor
        forks.keep_from_children(lambda: [each.fileno() for each in (*reactor.getReaders(), *reactor.getWriters())])
        self._open()
        try:
            self._start()
        except Exception as error:
            # The threads that already run would keep an idle process alive.
            self.log.failure("the role cannot start")
            refuse(one_line(error))
        streams.leave_terminal()
        super().startService()  # type: ignore[no-untyped-call]

    def _start(self) -> None:
        self._database.start()
        self._handlers.start()
        self._configure()
        self._keys.start()
        self._config.start()
        self._listener.start()
        for watch in self._watches:
            watch.start()
        self._begin()
        for digest in self._summaries:
            digest.start()
        tune_gc()
        self._watchdog.start()

    def stopService(self) -> Deferred[None]:
        """Accept no more work, finish the work in progress, then disconnect from the database."""
        super().stopService()  # type: ignore[no-untyped-call]
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._shutdown.step = "the work in hand and its links"
        await self._drain()
        self.factory.tell_rest()
        for digest in self._summaries:
            digest.stop()
        self._keys.stop()
        self._config.stop()
        self._shutdown.step = "the connection of notifications"
        await self._listener.stop()
        self._shutdown.step = "looks at the database"
        for watch in self._watches:
            await watch.stop()
        self._shutdown.step = "handlers, jobs and orders, and their connections"
        await self._handlers.stop()
        self._shutdown.step = "our own statements, and their connections"
        await self._database.stop()
        self._shutdown.step = "threads"
        self._watchdog.stop()
        self._shutdown.ended()

    def _open(self) -> None:
        """Do the part of the start that may be refused, before any thread exists that would keep the process alive."""

    @abstractmethod
    def _begin(self) -> None:
        """Start the components that need the database."""

    @abstractmethod
    async def _drain(self) -> None:
        """Finish the work in progress, and close the links."""

    @abstractmethod
    def _past_grace(self) -> None:
        """Cancel the work that still runs."""

    @abstractmethod
    def _configure(self) -> None:
        """Put the configuration in force."""

    @property
    def _kept(self) -> str:
        """Why rows of s2s are not written; empty: all are written."""
        return "; ".join(filter(None, (self._database.kept, self._guards.kept)))

    def _passing(self) -> dict[str, int]:
        """Return the numbers of the refusals that are not logged one by one, by code."""
        return {code: count for code, count in self._counters.errors_out.items() if BY_CODE[code].passing}

    def _health(self, **more: Any) -> dict[str, Any]:
        """Return ``more`` with ``config_version``, which every health reply has."""
        return {"config_version": self._config.version, **more}


def tune_gc() -> None:
    """Freeze the objects that exist now and raise the gen-0 threshold of the garbage collector."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_MADE, *gc.get_threshold()[1:])
