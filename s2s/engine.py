"""The engine role: reconnecting link, sweeps into the outbox, relay out of it."""

from __future__ import annotations

from typing import Any

from twisted.application import service
from twisted.application.internet import ClientService
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from s2s.backoff import Backoff
from s2s.catalogue import HEALTH_CHECK, SWEEP
from s2s.clock import Clock
from s2s.dispatch import Dispatcher, Responder
from s2s.keys import LiveKeys
from s2s.lifetime import watch
from s2s.limits import Bounds
from s2s.links import LinkFactory
from s2s.news import Digest, news
from s2s.protocol import Link
from s2s.relay import Relay, fits
from s2s.responders.health import Health, Identity
from s2s.responders.sweep import Sweep
from s2s.store import keys, outbox
from s2s.store.listen import Listener
from s2s.store.pool import Database


@implementer(IStreamClientEndpoint)
class _TellingEndpoint:
    """An endpoint that tells why it does not connect, once an outage: ``ClientService`` keeps that to itself."""

    log = Logger()

    def __init__(self, endpoint: Any, described: str) -> None:
        self._endpoint = endpoint
        self._described = described
        self._told = ""

    def connect(self, factory: Any) -> Deferred[Any]:
        connecting: Deferred[Any] = self._endpoint.connect(factory)
        return connecting.addCallbacks(self._connected, self._failed)

    def _connected(self, protocol: Any) -> Any:
        self._told = ""
        return protocol

    def _failed(self, failure: Failure) -> Failure:
        why = failure.getErrorMessage().rstrip(".")
        if why != self._told:
            self._told = why
            self.log.warn("no connection to {endpoint}: {why}", endpoint=self._described, why=why)
        return failure


class Engine(service.Service):
    """One engine process.

    :param connect: where the server is.
    :param described: the endpoint as the operator wrote it.
    """

    log = Logger()

    def __init__(
        self,
        connect: IStreamClientEndpoint,
        described: str,
        identity: Identity,
        bounds: Bounds,
        database: Database,
        live_keys: LiveKeys,
        relay: Relay,
        url: str,
        clock: Clock,
    ) -> None:
        self._described = described
        self._clock = clock
        self._database = database
        self._keys = live_keys
        self._relay = relay
        self._backoff = Backoff()
        self._link: Link | None = None
        self._listener = Listener(
            url,
            {keys.CHANNEL: live_keys.changed, outbox.CHANNEL: relay.wake},
            presence=identity.boot_id,
            application_name="s2s-engine listen",
        )
        responders: dict[str, Responder] = {
            HEALTH_CHECK: Health(identity, bounds.frame_size, clock, self._condition),
            SWEEP: Sweep(database, clock, fits(bounds.frame_size), relay.wake),
        }
        self.factory = LinkFactory("engine", Dispatcher(live_keys, responders, clock), live_keys, clock, self, bounds)
        live_keys.watchers.append(
            lambda keyring: self.factory.drop_revoked([self._link] if self._link else [], keyring)
        )
        endpoint = _TellingEndpoint(connect, described)
        self._client = ClientService(endpoint, self.factory, retryPolicy=self._backoff, clock=clock.scheduler)  # type: ignore[arg-type]
        self._digest = Digest(
            "outbox: {accepted} accepted by the server, {duplicates} duplicates, {retried} to send again, {dead} dead",
            self._counts,
            clock,
        )

    def startService(self) -> None:
        """Connect, and start everything behind."""
        watch(self._clock.scheduler)
        self._database.start()
        self._keys.start()
        self._listener.start()
        self._relay.start()
        self._digest.start()
        news.info("engine connects to {endpoint}", endpoint=self._described)
        self._client.startService()
        super().startService()  # type: ignore[no-untyped-call]

    @inlineCallbacks
    def stopService(self) -> Any:
        """Claim no more, settle what is in flight, then let link and database go."""
        super().stopService()  # type: ignore[no-untyped-call]
        yield self._relay.stop()
        yield self._client.stopService()
        self._digest.stop()
        self._keys.stop()
        yield self._listener.stop()
        yield self._database.stop()

    # --- the link ---------------------------------------------------------------------------------------------------

    def link_made(self, link: Link) -> None:
        """The TCP connection stands; that says nothing yet."""

    def link_proven(self, link: Link) -> None:
        """The server answers: send what waits."""
        self._backoff.proven()
        self._link = link
        news.info("link up: {link}", link=link)
        self._relay.linked(link)

    def link_lost(self, link: Link) -> None:
        """Remember how it ended; the outbox waits."""
        if link.is_slow:
            self._backoff.refused()
        if link is self._link:
            self._link = None
            self._relay.linked(None)
            news.warn("link down: {why}", why=link.why)
        else:
            self.log.warn("{link}: no link: {why}", link=link, why=link.why)

    def _condition(self) -> dict[str, Any]:
        return {
            "state": "running",
            "degraded": self._link is None or self._database.is_away,
            "config_version": 0,
            "outbox_depth": self._relay.depth,
        }

    def _counts(self) -> dict[str, int]:
        relay = self._relay
        return {
            "accepted": relay.accepted,
            "duplicates": relay.duplicates,
            "retried": relay.retried,
            "dead": relay.dead,
        }
