"""Verify the frames of links, and route their requests to responders (docs/protocol.rst, "Order of checks").

The keys of ``s2s_keys`` come from a :class:`KeySource`, which reads them through the ``adbapi`` pool. The session of
the link makes every check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred

from s2s.errors import WireError
from s2s.protocol.envelope import Envelope
from s2s.protocol.received import Received, Refusal, Request, UnknownKey
from s2s.protocol.session import Session
from s2s.protocol.signing import Keyring
from s2s.runtime.clock import Clock


class KeySource(Protocol):
    """The keys, held in memory and read again on request."""

    @property
    def keyring(self) -> Keyring:
        """The snapshot of the keys that was read last."""

    def refresh(self) -> Deferred[None]:
        """Read the keys again, at most once a second.

        :returns: fires after a read that began after this call, or after the attempt was given up.
        """


#: Serves one type of request: returns the reply's payload or a Deferred of it, or raises a
#: :class:`~s2s.errors.WireError`.
Responder = Callable[[Request], "Mapping[str, Any] | Deferred[dict[str, Any]]"]


class Dispatcher:
    """Verifies the frames of any number of links, and calls the responders of their requests.

    :param responders: the responders of this process, by message type.
    :param refused: called with each refused request whose MAC and envelope are valid, the ``key_id`` and the error.
    """

    def __init__(
        self,
        keys: KeySource,
        responders: Mapping[str, Responder],
        clock: Clock,
        refused: Callable[[Envelope, str, WireError], object] = lambda *_: None,
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._refused = refused
        self._responders = responders

    def receive(self, frame: bytes, session: Session, unknown: UnknownKey | None = None) -> Received:
        """Verify and classify one frame; see :meth:`s2s.protocol.session.Session.receive`."""
        clock = self._clock
        received = session.receive(frame, self._keys.keyring, self._responders, clock.now(), clock.mono(), unknown)
        if type(received) is Refusal and received.request is not None:
            self._refused(received.request, str(session.peer_key_id), received.error)
        return received

    def respond(self, request: Request) -> Mapping[str, Any] | Deferred[dict[str, Any]]:
        """Call the responder of a request.

        :raises WireError: the request is refused.
        """
        return self._responders[request.message.name](request)
