"""The server role: listener, links, sweeps, inbox, executor, and the control requests and orders for engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred, DeferredList, gatherResults, maybeDeferred
from twisted.python.failure import Failure

from s2s.admin.http.service import Web
from s2s.link.coalesced_request import CoalescedRequest
from s2s.link.connection import Link
from s2s.link.dispatcher import Dispatcher, Responder
from s2s.link.factory import LinkFactory, ServerLinks
from s2s.protocol.catalogue import BUMP, COMMAND_PUSH, HEALTH_CHECK, SWEEP
from s2s.roles.base import Role, RoleDeps
from s2s.roles.health import Health
from s2s.roles.server.control_sender import ControlSender
from s2s.roles.server.executor import Executor
from s2s.roles.server.inbox import Inbox
from s2s.roles.server.order_sender import OrderSender
from s2s.roles.server.retention import Retention
from s2s.roles.server.served_types import LiveServedTypes
from s2s.roles.shutdown import refuse
from s2s.runtime.status_log import CounterSummary, status_log
from s2s.store.monitors.backlog_watch import Watch
from s2s.store.monitors.clock_watch import ClockWatch
from s2s.store.monitors.database_probe import DatabaseProbe
from s2s.store.tables import broadcasts, claims, command_types, control_requests, orders
from s2s.store.tables.clock_drift import SERVER_RULES, SERVER_STEPS
from s2s.store.tables.retention import Keep


@dataclass(frozen=True)
class ListenSpec:
    """An endpoint to listen on.

    :param endpoint: an ``IStreamServerEndpoint``.
    :param described: the endpoint as the operator wrote it.
    :param option: the command-line option that sets it.
    """

    endpoint: Any
    described: str
    option: str


class Server(Role):
    """One server process.

    :param listen: the endpoint for engines.
    :param http: the endpoint of the HTTP API; ``None``: the API is not served.
    :param hosts: further host names by which clients of the API may call this server.
    :param types: the command types that the inbox accepts.
    """

    def __init__(
        self,
        deps: RoleDeps,
        listen: ListenSpec,
        inbox: Inbox,
        executor: Executor,
        http: ListenSpec | None,
        hosts: Collection[str],
        types: LiveServedTypes,
    ) -> None:
        clock = deps.clock
        self._inbox = inbox
        self._types = types
        self._probe = DatabaseProbe(deps.database, clock)
        self._executor = executor
        self._is_draining = False
        self.links = ServerLinks(deps.counters, clock, self._engine_up, self._links_changed)
        self._control_sender = ControlSender(deps.database, self.links, deps.identity.boot_id, clock)
        self._order_sender = OrderSender(deps.database, self.links, clock, deps.plugins.orders)
        on_notify = {
            broadcasts.CHANNEL: self._sweep,
            control_requests.CHANNEL: self._control_sender.wake,
            orders.CHANNEL: self._order_sender.wake,
            command_types.CHANNEL: types.notify,
        }
        self._web: Web | None = None
        if http is not None:
            self._web = Web(deps.database, clock, deps.counters, self._readiness, hosts, deps.plugins)
            on_notify.update(self._web.on_notify)
        super().__init__(deps, on_notify)
        executor.is_present = lambda: self._listener.is_present
        responders: dict[str, Responder] = {
            HEALTH_CHECK: Health(deps.identity, deps.bounds.frame_size, clock, self._condition),
            COMMAND_PUSH: lambda request: inbox.push(request.payload),
        }
        dispatcher = Dispatcher(deps.live_keys, responders, clock)
        self.factory = LinkFactory(
            "server",
            dispatcher,
            deps.live_keys,
            clock,
            self.links,
            deps.bounds,
            counters=deps.counters,
            catalogue=deps.plugins.catalogue,
        )
        deps.live_keys.watchers.append(lambda keyring: self.factory.drop_revoked(self.links, keyring))
        # An engine queues a limited number of broadcasts for each request: the sweep is repeated while it queues any.
        self._sweeps = CoalescedRequest(SWEEP, lambda _: {"since_ts": 0}, lambda _, ack: bool(ack["queued"]), clock)
        self._sweeping = task.LoopingCall(self._sweep)
        self._sweeping.clock = clock.scheduler
        self._bumps = CoalescedRequest(BUMP, self._bump_for, self._bumped, clock)
        self._watches.append(Watch(deps.database, clock, executor.types))
        self._clock_watch = ClockWatch(deps.database, clock, SERVER_RULES, SERVER_STEPS)
        self._retention = Retention(deps.database, clock, self._keep, lambda: self._clock_watch.is_trusted)
        self._summaries.append(CounterSummary("commands", self._counts, clock))
        self._listens: list[tuple[ListenSpec, Any, str]] = [(listen, self.factory, "server")]
        if http is not None and self._web is not None:
            web = self._web
            self._listens.append((http, web.site, "HTTP API"))
            self._summaries.append(CounterSummary("HTTP API", lambda: web.counts, clock, longest_s=60))
        self._ports: list[Any] = []

    def _open(self) -> None:
        for entrance, factory, name in self._listens:
            failures: list[Failure] = []
            entrance.endpoint.listen(factory).addCallbacks(self._ports.append, failures.append)
            for failure in failures:  # raised here, since a Deferred would keep the exception
                why = failure.getErrorMessage().rstrip(".")
                cure = f"free it or choose another --{entrance.option}"
                refuse(f"cannot listen on {entrance.described}: {why}: {cure}")
            status_log.info("{name} listens on {endpoint}", name=name, endpoint=entrance.described)

    def _begin(self) -> None:
        self._types.start()
        self._executor.start()
        self._control_sender.start()
        self._order_sender.start()
        self._clock_watch.start()
        self._retention.start()
        if self._web is not None:
            self._web.start()

    async def _drain(self) -> None:
        self._is_draining = True
        self._shutdown.shutdown_transaction = self._release_claims
        await DeferredList([maybeDeferred(port.stopListening) for port in self._ports])
        if self._sweeping.running:
            self._sweeping.stop()
        self._sweeps.stop()
        self._bumps.stop()
        self._retention.stop()
        # Drain the inbox before the types stop: a push whose type is being looked up is then refused because the server
        # stops, and not because its type is unknown.
        draining = self._inbox.drain()
        self._types.stop()
        web = [] if self._web is None else [Deferred.fromCoroutine(self._web.stop())]
        await DeferredList(
            [
                *web,
                draining,
                self._executor.stop(),
                self._control_sender.stop(),
                self._order_sender.stop(),
                self._clock_watch.stop(),
            ],
            consumeErrors=True,
        )
        self.links.close_all("the server stops")

    def _past_grace(self) -> None:
        cancelling = gatherResults([self._handlers.cancel(), self._database.cancel()])
        cancelling.addBoth(lambda _: self._executor.abandon())

    def _release_claims(self) -> None:
        # An unfinished batch is rolled back when the process ends. Without a claim its commands are not charged.
        with self._database.shutdown_transaction() as txn:
            claims.release_all(txn, self._identity.boot_id)

    def _configure(self) -> None:
        number = self._config.number
        self.factory.configure(number)
        self._executor.batch_size = number("executor.batch_size")
        interval_s = number("server.sweep_interval_s")
        if self._sweeping.interval != interval_s and not self._is_draining:
            if self._sweeping.running:
                self._sweeping.stop()
            self._sweeping.start(interval_s, now=False)
        self._bumps.run_all(self.links.engines)

    def _keep(self) -> Keep:
        number = self._config.number
        return Keep(number("commands.keep_days"), number("commands.keep_dead_days"), number("commands.keep_key_days"))

    def _condition(self) -> dict[str, Any]:
        state = "draining" if self._is_draining else "running"
        stuck = [task.name[:200] for task in self._handlers.stuck]
        return self._health(
            state=state, degraded=self._database.is_away or bool(self._kept), outbox_depth=0, stuck=stuck
        )

    async def _readiness(self) -> dict[str, str]:
        """Return the condition of each part that must work for the server to be ready."""
        executor = self._executor.condition
        return {
            "database": _with(await self._probe.check(), self._kept),
            "pushes": self._inbox.condition,
            "executor": executor if executor == "off" else _with(executor, self._rows.held),
        }

    def _counts(self) -> dict[str, int]:
        return {
            "accepted": self._inbox.accepted,
            "duplicates": self._inbox.duplicates,
            "run": self._executor.ran,
            "failed": self._executor.failed,
            "dead": self._executor.dead,
        }

    # --- engines ----------------------------------------------------------------------------------------------------

    def _engine_up(self, link: Link) -> None:
        self._links_changed()
        self._control_sender.wake()
        self._order_sender.wake()
        self._bumps.run(link)
        self._sweeps.run(link)

    def _links_changed(self) -> None:
        self._control_sender.links_changed()

    def _sweep(self) -> None:
        self._sweeps.run_all(self.links.engines)

    def _bump_for(self, link: Link) -> Mapping[str, Any] | None:
        version = self._config.version
        running = link.peer.get("config_version", 0)
        return {"version": version} if running < version else None

    def _bumped(self, link: Link, ack: Mapping[str, Any]) -> bool:
        link.peer = {**link.peer, "config_version": ack["version"]}
        return False


def _with(condition: str, trouble: str) -> str:
    """Return the condition of a part, followed by the trouble of its tables if there is any."""
    return f"{condition}{', but' if condition == 'ok' else ';'} {trouble}" if trouble else condition
