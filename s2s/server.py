"""The server role: listener, links, sweeps, inbox, executor, and what operators ask of engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet import task
from twisted.internet.defer import DeferredList
from twisted.python.failure import Failure

from s2s.catalogue import BUMP, COMMAND_PUSH, HEALTH_CHECK, SWEEP
from s2s.courier import Courier
from s2s.dispatch import Dispatcher, Responder
from s2s.errand import Errand
from s2s.executor import Executor
from s2s.inbox import Inbox
from s2s.lifetime import refuse
from s2s.links import LinkFactory, ServerLinks
from s2s.news import Digest, news
from s2s.protocol import Link
from s2s.responders.health import Health
from s2s.responders.push import Push
from s2s.retention import Retention
from s2s.role import Basis, Role
from s2s.steering import Steerer
from s2s.store import broadcasts, notes, orders, steering
from s2s.store.retention import Keep


class Server(Role):
    """One server process.

    :param listen: an ``IStreamServerEndpoint``, where engines connect.
    :param described: the endpoint as the operator wrote it.
    """

    def __init__(self, basis: Basis, listen: Any, described: str, inbox: Inbox, executor: Executor) -> None:
        clock = basis.clock
        self._endpoint = listen
        self._described = described
        self._inbox = inbox
        self._executor = executor
        self._is_draining = False
        self.links = ServerLinks(basis.counters, self._engine_up, self._links_changed)
        self._steerer = Steerer(basis.database, self.links, basis.identity.boot_id, clock)
        self._courier = Courier(basis.database, self.links, clock)
        hears = {
            broadcasts.CHANNEL: self._sweep,
            steering.CHANNEL: self._steerer.wake,
            orders.CHANNEL: self._courier.wake,
        }
        super().__init__(basis, hears)
        executor.is_present = lambda: self._listener.is_present
        responders: dict[str, Responder] = {
            HEALTH_CHECK: Health(basis.identity, basis.bounds.frame_size, clock, self._condition),
            COMMAND_PUSH: Push(inbox),
        }
        dispatcher = Dispatcher(basis.live_keys, responders, clock)
        self.factory = LinkFactory(
            "server", dispatcher, basis.live_keys, clock, self.links, basis.bounds, counters=basis.counters
        )
        basis.live_keys.watchers.append(lambda keyring: self.factory.drop_revoked(self.links, keyring))
        # An engine sweeps a bounded number at a time.
        self._sweeps = Errand(SWEEP, lambda _: {"since_ts": 0}, lambda _, ack: bool(ack["queued"]), clock)
        self._sweeping = task.LoopingCall(self._sweep)
        self._sweeping.clock = clock.scheduler
        self._bumps = Errand(BUMP, self._bump_for, self._bumped, clock)
        self._retention = Retention(basis.database, clock, self._keep)
        self._digests.append(Digest("commands", self._counts, clock))
        self._port: Any = None

    def _open(self) -> None:
        failures: list[Failure] = []
        self._endpoint.listen(self.factory).addCallbacks(self._listening, failures.append)
        for failure in failures:  # here, since a Deferred would keep the exception
            why = failure.getErrorMessage().rstrip(".")
            refuse(f"cannot listen on {self._described}: {why}: free it or choose another --listen")

    def _listening(self, port: Any) -> None:
        self._port = port
        news.info("server listens on {endpoint}", endpoint=self._described)

    def _begin(self) -> None:
        self._executor.start()
        self._steerer.start()
        self._courier.start()
        self._retention.start()

    async def _drain(self) -> None:
        self._is_draining = True
        self._lifetime.last_words = self._strike_notes
        if self._port is not None:
            await self._port.stopListening()
        if self._sweeping.running:
            self._sweeping.stop()
        self._retention.stop()
        await DeferredList(
            [self._inbox.drain(), self._executor.stop(), self._steerer.stop(), self._courier.stop()], consumeErrors=True
        )
        self.links.close_all("the server stops")

    def _past_grace(self) -> None:
        self._database.cancel().addBoth(lambda _: self._executor.abandon())

    def _strike_notes(self) -> None:
        # What is left of a batch rolls back with the process: nobody is to be charged for it.
        with self._database.last_words() as txn:
            notes.strike_all(txn, self._identity.boot_id)

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
        return self._health(state=state, degraded=self._database.is_away, outbox_depth=0)

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
        self._steerer.wake()
        self._courier.wake()
        self._bumps.run(link)
        self._sweeps.run(link)

    def _links_changed(self) -> None:
        self._steerer.links_changed()

    def _sweep(self) -> None:
        self._sweeps.run_all(self.links.engines)

    def _bump_for(self, link: Link) -> Mapping[str, Any] | None:
        version = self._config.version
        running = link.peer.get("config_version", 0)
        return {"version": version} if running < version else None

    def _bumped(self, link: Link, ack: Mapping[str, Any]) -> bool:
        link.peer = {**link.peer, "config_version": ack["version"]}
        return False
