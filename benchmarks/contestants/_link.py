"""The engine's side of our link, as a client that pushes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

from benchmarks.contestants import _twisted
from benchmarks.kits import drive_deferred, drive_deferred_evenly
from benchmarks.load import Load, Meter, Place, keys, push
from s2s.errors import Overloaded, Refused
from s2s.link.connection import Link
from s2s.link.dispatcher import Dispatcher, Responder
from s2s.link.factory import LinkFactory
from s2s.protocol.catalogue import COMMAND_PUSH, HEALTH_CHECK, SWEEP
from s2s.protocol.identity import Identity
from s2s.protocol.limits import Bounds, Timing
from s2s.protocol.signing import Key, Keyring, Role, Secret
from s2s.roles.health import Health
from s2s.runtime.clock import Clock

#: The only key, in memory and in the database.
KEY_ID = "bench"
SECRET = b"a key of the benchmark, not secret"


class Keys:
    """A key source with one key that never changes."""

    keyring = Keyring([Key(KEY_ID, Secret(SECRET), "any", 0.0, is_default_tx=True)])

    def refresh(self) -> Deferred[None]:
        """Do nothing: the key never changes."""
        return succeed(None)


class Events:
    """Reports when a link is proven."""

    def __init__(self) -> None:
        self._waiting: dict[Link, Deferred[None]] = {}

    def proven(self, link: Link) -> Deferred[None]:
        """Return a Deferred that fires when the link is proven."""
        return self._waiting.setdefault(link, Deferred())

    def link_made(self, link: Link) -> None:
        """Do nothing: the link is not proven yet."""

    def link_proven(self, link: Link) -> None:
        """Fire the Deferred of the link."""
        self.proven(link).callback(None)

    def link_lost(self, link: Link) -> None:
        """Do nothing: the link itself fails the calls that wait for an answer."""


def factory(role: Role, events: Events, window: int, name: str = "bench", **responders: Responder) -> LinkFactory:
    """Make a factory of links that uses no database.

    :param name: the name in the role's answers to health checks.
    :param responders: responders by message type, in addition to the health check.
    """
    clock, bounds = Clock(reactor), Bounds(window_frames=window)
    health = Health(Identity(role, name, "bench"), bounds.frame_size, clock, _condition)
    serving: Mapping[str, Responder] = {HEALTH_CHECK: health, **responders}
    # A long timeout, so that no call of the benchmark expires.
    return LinkFactory(role, Dispatcher(Keys(), serving, clock), Keys(), clock, events, bounds, Timing(call=60))


def _condition() -> dict[str, Any]:
    return {"state": "running", "degraded": False, "config_version": 10**9, "outbox_depth": 0}


async def connect(place: Place, load: Load) -> list[Any]:
    """Make ``load.links`` links, each of a different engine, and wait until they are proven."""
    events = Events()
    links = []
    for number in range(load.links):
        sweep = {SWEEP: lambda _: {"ok": True, "queued": 0}}
        making = factory("engine", events, load.window, f"bench-{number}", **sweep)
        links.append(await _twisted.connect(place, making))
        await events.proven(links[-1])
    return links


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Push commands over links of an engine, and wait for each answer."""
    filling, made = load.filling, keys("s2s", load.is_scattered)

    async def driving() -> None:
        engines = await connect(place, load)
        calls = [lambda link=link: link.call(COMMAND_PUSH, push(next(made), filling)) for link in engines]
        if load.rate:
            # This rate never fills the inbox, so that no push is refused and retried.
            await drive_deferred_evenly(calls[0], load, meter)
        else:
            # The link bounds its window and its queue of calls in bytes, so that fewer long frames fit.
            window = min(load.window, Bounds().line_bytes // load.size)
            await drive_deferred(calls, replace(load, window=window), meter, _rest)

    _twisted.run(driving())


def _rest(failure: Failure) -> float:
    """Return the seconds to wait after a push that the server refused as ``overloaded``; 0 for any other failure."""
    if failure.check(Refused) and failure.value.code == Overloaded.code:
        return float(failure.value.details["retry_after_ms"]) / 1000
    return 0.0
