"""The server role: listener, links, sweeps, inbox, executor."""

from __future__ import annotations

from typing import Any, Final

from twisted.application import service
from twisted.internet import task
from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.catalogue import COMMAND_PUSH, HEALTH_CHECK, SWEEP
from s2s.clock import Clock
from s2s.dispatch import Dispatcher, Responder
from s2s.errors import Refused, S2SError
from s2s.executor import Executor
from s2s.inbox import Inbox
from s2s.keys import LiveKeys
from s2s.lifetime import refuse, watch
from s2s.limits import Bounds
from s2s.links import LinkFactory, ServerLinks
from s2s.news import Digest, news
from s2s.protocol import Link
from s2s.responders.health import Health, Identity
from s2s.responders.push import Push
from s2s.store import broadcasts, keys
from s2s.store.listen import Listener
from s2s.store.pool import Database

#: Beside the one at link-up and the one on a new broadcast.
SWEEP_S: Final = 10.0


class Server(service.Service):
    """One server process.

    :param listen: an ``IStreamServerEndpoint``, where engines connect.
    :param live_keys: the keys, read before the start.
    :param listener: hears the database; its callbacks are set here.
    :param described: the endpoint as the operator wrote it.
    """

    log = Logger()

    def __init__(
        self,
        listen: Any,
        described: str,
        identity: Identity,
        bounds: Bounds,
        database: Database,
        live_keys: LiveKeys,
        inbox: Inbox,
        executor: Executor,
        url: str,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._endpoint = listen
        self._described = described
        self._database = database
        self._keys = live_keys
        self._inbox = inbox
        self._executor = executor
        self._listener = Listener(
            url,
            {keys.CHANNEL: live_keys.changed, broadcasts.CHANNEL: self._sweep_all},
            presence=identity.boot_id,
            application_name="s2s-server listen",
        )
        self.links = ServerLinks(self._sweep)
        responders: dict[str, Responder] = {
            HEALTH_CHECK: Health(identity, bounds.frame_size, clock, self._condition),
            COMMAND_PUSH: Push(inbox),
        }
        self.factory = LinkFactory(
            "server", Dispatcher(live_keys, responders, clock), live_keys, clock, self.links, bounds
        )
        live_keys.watchers.append(lambda keyring: self.factory.drop_revoked(self.links, keyring))
        self._sweeps = task.LoopingCall(self._sweep_all)
        self._sweeps.clock = clock.scheduler
        self._sweeping: dict[Link, bool] = {}
        self._digest = Digest(
            "commands: {accepted} accepted, {duplicates} duplicates, {ran} run, {dead} dead", self._counts, clock
        )
        self._port: Any = None

    def startService(self) -> None:
        """Listen, then start everything behind."""
        watch(self._clock.scheduler)
        # First of all: a port that is taken must leave no thread behind that would keep the process alive.
        failures: list[Failure] = []
        self._endpoint.listen(self.factory).addCallbacks(self._listening, failures.append)
        for failure in failures:  # here, since a Deferred would keep the exception
            why = failure.getErrorMessage().rstrip(".")
            refuse(f"cannot listen on {self._described}: {why}: free it or choose another --listen")
        self._database.start()
        self._keys.start()
        self._listener.start()
        self._executor.start()
        self._sweeps.start(SWEEP_S, now=False)
        self._digest.start()
        super().startService()  # type: ignore[no-untyped-call]

    def _listening(self, port: Any) -> None:
        self._port = port
        news.info("server listens on {endpoint}", endpoint=self._described)

    @inlineCallbacks
    def stopService(self) -> Any:
        """Take no more, finish what is in hand, then let the database go."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._port is not None:
            yield self._port.stopListening()
        if self._sweeps.running:
            self._sweeps.stop()
        yield DeferredList([self._inbox.drain(), self._executor.stop()], consumeErrors=True)
        self.links.close_all("the server stops")
        self._digest.stop()
        self._keys.stop()
        yield self._listener.stop()
        yield self._database.stop()

    def _condition(self) -> dict[str, Any]:
        return {"state": "running", "degraded": self._database.is_away, "config_version": 0, "outbox_depth": 0}

    def _counts(self) -> dict[str, int]:
        return {
            "accepted": self._inbox.accepted,
            "duplicates": self._inbox.duplicates,
            "ran": self._executor.ran,
            "dead": self._executor.dead,
        }

    # --- sweeps -----------------------------------------------------------------------------------------------------

    def _sweep_all(self) -> None:
        for link in self.links.engines:
            self._sweep(link)

    def _sweep(self, link: Link) -> None:
        if not link.session.is_open:
            return
        # However many broadcasts are typed at once: one sweep under way, and one more for what it may have missed.
        if link in self._sweeping:
            self._sweeping[link] = True
            return
        self._sweeping[link] = False
        sweeping: Deferred[Any] = link.call(SWEEP, {"since_ts": 0})
        sweeping.addErrback(self._sweep_failed, link)
        sweeping.addCallback(self._swept, link)

    def _swept(self, ack: dict[str, Any] | None, link: Link) -> None:
        may_have_missed = self._sweeping.pop(link)
        # An engine sweeps a bounded number at a time.
        if may_have_missed or (ack and ack["queued"]):
            self._sweep(link)

    def _sweep_failed(self, failure: Failure, link: Link) -> None:
        failure.trap(S2SError)
        error = failure.value
        self.log.warn("{link}: the sweep failed: {why}", link=link, why=str(error))
        if isinstance(error, Refused) and error.retryable and error.retry_after_ms is not None:
            self._clock.scheduler.callLater(min(error.retry_after_ms / 1000, SWEEP_S), self._sweep, link)
