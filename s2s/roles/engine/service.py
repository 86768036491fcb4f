"""The engine role: reconnecting link, jobs and sweeps into the outbox, relay out of it, control requests and orders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from twisted.application.internet import ClientService
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from s2s.link.backoff import Backoff
from s2s.link.connection import Link
from s2s.link.dispatcher import Dispatcher, Responder
from s2s.link.factory import LinkFactory
from s2s.protocol.catalogue import BUMP, HEALTH_CHECK, PAUSE, RESUME, SHUTDOWN, SWEEP
from s2s.roles.base import Role, RoleDeps
from s2s.roles.engine.audit_log import AuditLog
from s2s.roles.engine.desired_state import DesiredState
from s2s.roles.engine.order_runner import OrderRunner
from s2s.roles.engine.relay import Relay
from s2s.roles.engine.responders.bump import Bump
from s2s.roles.engine.responders.order import RunOrder
from s2s.roles.engine.responders.pause import Pause
from s2s.roles.engine.responders.shutdown import Shutdown
from s2s.roles.engine.responders.sweep import Sweep
from s2s.roles.engine.scheduler import Scheduler
from s2s.roles.engine.state import EngineState, guard
from s2s.roles.health import Health
from s2s.runtime.clock import Clock, Timer, cancel
from s2s.runtime.line_quota import MOST_TOLD, PERIOD_S, LineQuota
from s2s.runtime.status_log import CounterSummary, status_log
from s2s.store.monitors.clock_watch import ClockWatch
from s2s.store.tables import engines, orders, outbox
from s2s.store.tables.clock_drift import ENGINE_RULES

#: The resolution of ``ts`` in seconds.
GRAIN_S: Final = 1.0
#: Seconds that the relay has to give back its rows in flight when the grace of the shutdown is over.
GIVE_BACK_S: Final = 0.3
#: Seconds after which a connection attempt that is still open is logged: a resolver may hang without an end.
CONNECTING_S: Final = 10.0


@implementer(IStreamClientEndpoint)
class _TellingEndpoint:
    """An endpoint that logs why it does not connect, once an outage: ``ClientService`` does not log that."""

    log = Logger()

    def __init__(self, endpoint: Any, described: str, clock: Clock) -> None:
        self._endpoint = endpoint
        self._described = described
        self._clock = clock
        self._told = ""

    def __repr__(self) -> str:
        return self._described

    def connect(self, factory: Any) -> Deferred[Any]:
        connecting: Deferred[Any] = self._endpoint.connect(factory)
        telling = self._clock.scheduler.callLater(CONNECTING_S, self._still_connecting)
        connecting.addBoth(self._settled, telling)
        return connecting.addCallbacks(self._connected, self._failed)

    def _settled(self, outcome: Any, telling: Timer) -> Any:
        cancel(telling)
        return outcome

    def _still_connecting(self) -> None:
        if not self._told:
            self._told = "there is no answer"
            self.log.warn(
                "still connecting to {endpoint} after {seconds:g} s: neither the host nor a name server answers",
                endpoint=self._described,
                seconds=CONNECTING_S,
            )

    def _connected(self, protocol: Any) -> Any:
        self._told = ""
        return protocol

    def _failed(self, failure: Failure) -> Failure:
        why = failure.getErrorMessage().rstrip(".")
        if why != self._told:
            self._told = why
            self.log.warn("no connection to {endpoint}: {why}", endpoint=self._described, why=why)
        return failure


class Engine(Role):
    """One engine process.

    :param connect: the endpoint of the server.
    :param described: the endpoint as the operator wrote it.
    """

    def __init__(self, deps: RoleDeps, connect: IStreamClientEndpoint, described: str, relay: Relay) -> None:
        plugins = deps.plugins
        clock, database = deps.clock, deps.database
        self._born = clock.mono()
        self._described = described
        self._relay = relay
        self._backoff = Backoff()
        #: The current connection, and the same link once it is proven.
        self._connected: Link | None = None
        self._link: Link | None = None
        self._proven_at = 0.0
        #: Limits the log lines, since a server may accept, prove and close links many times a second.
        self._lines = LineQuota(clock.scheduler, self._tell_often, MOST_TOLD)
        self._is_up_told = False
        self._condition = EngineState()
        self._wanted = DesiredState(database, clock, deps.identity.name, self._condition)
        self._audit_log = AuditLog(database, deps.counters, deps.identity.name, plugins.orders)
        self._clock_watch = ClockWatch(database, clock, ENGINE_RULES)
        frame_size = deps.bounds.frame_size
        self._scheduler = Scheduler(
            deps.identity.boot_id,
            database,
            deps.handlers,
            clock,
            plugins.jobs,
            self._condition,
            frame_size,
            relay.wake,
            plugins.defaults,
        )
        self._orders = OrderRunner(
            database,
            deps.handlers,
            clock,
            plugins,
            deps.identity.name,
            self._condition,
            lambda: self._link is not None,
            relay.wake,
            frame_size,
        )
        on_notify = {
            outbox.CHANNEL: relay.wake,
            engines.CHANNEL: self._wanted.notify,
            orders.CHANNEL: self._orders.wake,
        }
        super().__init__(deps, on_notify)
        order = guard(self._condition.check_started, RunOrder(self._orders))
        responders: dict[str, Responder] = {
            HEALTH_CHECK: Health(deps.identity, frame_size, clock, self._state),
            SWEEP: guard(self._condition.check_taking, Sweep(database, clock, frame_size, relay.wake)),
            BUMP: guard(self._condition.check_taking, Bump(deps.live_config)),
            PAUSE: guard(self._condition.check_started, Pause(self._wanted, "paused", self._condition)),
            RESUME: guard(self._condition.check_started, Pause(self._wanted, "running", self._condition)),
            SHUTDOWN: Shutdown(deps.shutdown.end, self._condition, self._audit_log.answered),
            **dict.fromkeys(plugins.orders, order),
        }
        dispatcher = Dispatcher(deps.live_keys, responders, clock, self._audit_log.refused)
        self.factory = LinkFactory(
            "engine",
            dispatcher,
            deps.live_keys,
            clock,
            self,
            deps.bounds,
            counters=deps.counters,
            catalogue=plugins.catalogue,
        )
        deps.live_keys.watchers.append(
            lambda keyring: self.factory.drop_revoked([self._connected] if self._connected else [], keyring)
        )
        endpoint = _TellingEndpoint(connect, described, clock)
        self._client = ClientService(endpoint, self.factory, retryPolicy=self._backoff, clock=clock.scheduler)  # type: ignore[arg-type]
        self._summaries.append(CounterSummary("outbox", self._counts, clock))

    def _begin(self) -> None:
        self._relay.start()
        self._clock_watch.start()
        self._scheduler.start()
        self._orders.start()
        # Read the wanted state before connecting: until it is known, the engine has to refuse the server's requests.
        self._wanted.start().addBoth(self._wait)

    def _wait(self, _: object) -> None:
        # After this pause every frame signed for an earlier process is older than the first proof of this one, even
        # though ts counts whole seconds.
        old_s = self._clock.mono() - self._born
        self._clock.scheduler.callLater(max(0.0, GRAIN_S - old_s), self._connect)

    def _connect(self) -> None:
        if not self._condition.is_draining:
            status_log.info("engine connects to {endpoint}", endpoint=self._described)
            self._client.startService()

    async def _drain(self) -> None:
        self._condition.is_draining = True
        self._wanted.stop()
        running = gatherResults([self._scheduler.stop(), self._orders.stop(), self._clock_watch.stop()])
        if self._link is not None:
            await self._link.wait_idle()
        await running
        await self._relay.flush()
        await self._relay.stop()
        if self._connected is not None:
            await self._connected.wait_idle()
            self._connected.close("the engine stops")
        await self._client.stopService()
        await self._audit_log.wait_idle()
        self._lines.stop()

    def _past_grace(self) -> None:
        if self._connected is not None:
            # The connection is closed and not aborted, since a reply may still be in the write buffer.
            self._connected.close("the grace of the shutdown is over")
        # Cancel after the relay has given back its rows in flight.
        self._clock.scheduler.callLater(GIVE_BACK_S, self._handlers.cancel)
        self._clock.scheduler.callLater(GIVE_BACK_S, self._database.cancel)

    def _configure(self) -> None:
        self.factory.configure(self._config.number)
        self._relay.window_rows = self._config.number("relay.window")

    # --- the link ---------------------------------------------------------------------------------------------------

    def link_made(self, link: Link) -> None:
        """Remember a new connection, whose link is not proven yet."""
        self._connected = link

    def link_proven(self, link: Link) -> None:
        """Send the waiting outbox rows, since the server has answered."""
        self._backoff.proven()
        self._proven_at = self._clock.mono()
        self._link = link
        self._is_up_told = self._lines.may_tell("up")
        if self._is_up_told:
            status_log.info("link up: {link}", link=link)
        self._relay.linked(link)

    def link_lost(self, link: Link) -> None:
        """Set the backoff by the way in which the link ended; outbox rows wait for the next link."""
        self._connected = None
        if link.close_reason.backoff_class == "slow" and link is self._link:
            self._backoff.dismissed(self._clock.mono() - self._proven_at)
        elif link.close_reason.backoff_class == "slow":
            self._backoff.refused()
        if link is self._link:
            self._link = None
            self._relay.linked(None)
            if self._is_up_told or self._clock.mono() >= self._proven_at + PERIOD_S:
                status_log.warn("link down: {why}", why=link.close_reason.text)
        elif link.may_tell(link.close_reason.text):
            self.log.warn("{link}: no link: {why}", link=link, why=link.close_reason.text)

    def _tell_often(self, untold: Mapping[str, int]) -> None:
        self.log.warn(
            "the link came up {count} more times, and is {state} now: the server may close each link right after it was"
            " proven: see its log",
            count=sum(untold.values()),
            state="down" if self._link is None else "up",
        )

    def _state(self) -> dict[str, Any]:
        degraded = self._link is None or self._database.is_away or bool(self._kept)
        stuck = [task.name[:200] for task in self._handlers.stuck]
        return self._health(state=self._condition.state, degraded=degraded, outbox_depth=self._relay.depth, stuck=stuck)

    def _counts(self) -> dict[str, int]:
        relay = self._relay
        return {
            "accepted by the server": relay.accepted,
            "duplicates": relay.duplicates,
            "to send again": relay.retried,
            "dead": relay.dead,
        }
