"""The peer's requests on one link, and our answers (docs/protocol.rst, "Requests and replies", "Windows")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from ulid_transform import ulid_now

from s2s.errors import DeadlineExceeded, InternalError, TooBigToSend, WireError
from s2s.link.dispatcher import Dispatcher
from s2s.link.peer_lines import FRAMES
from s2s.link.read_pause import ReadPause
from s2s.protocol import canonical, envelope
from s2s.protocol.limits import Counters
from s2s.protocol.received import Refusal, Request
from s2s.protocol.session import PendingRequest, Session, State
from s2s.runtime.clock import Clock
from s2s.runtime.waiters import Waiters


class LinkOutput(Protocol):
    """The part of a link that answers requests.

    :ivar read_pause: pauses the reading of the link.
    """

    read_pause: ReadPause

    def send_reply(self, type: str, body: bytes, ack_of: str) -> None:
        """Write a reply with the canonical bytes of its payload to the request with this ``id``."""

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error."""

    def may_tell(self, why: str, kind: str) -> bool:
        """Whether the log may have a line, and a traceback, for a cause."""


class InboundRequests:
    """The peer's requests that wait for our answer. Each is answered once and in time, and their number is bounded.

    Reading is paused while the bound is reached.
    """

    log = Logger()

    def __init__(
        self, session: Session, dispatcher: Dispatcher, clock: Clock, counters: Counters, output: LinkOutput
    ) -> None:
        self._session = session
        self._dispatcher = dispatcher
        self._clock = clock
        self._counters = counters
        self._output = output
        self._until_idle: Waiters[None] = Waiters()

    def serve(self, request: Request) -> None:
        """Call the responder of a request, and send its answer."""
        answer: Mapping[str, Any] | Failure | Deferred[dict[str, Any]]
        try:
            answer = self._dispatcher.respond(request)
        except Exception:
            answer = Failure()
        # Track the request after the call: the work that the responder started is under way by now.
        pending = self._session.track(request.message, request.envelope.id, request.size, self._clock.mono())
        if isinstance(answer, Deferred):
            answer.addBoth(self._answered, pending)
        else:
            self._answered(answer, pending)
        if self._session.is_saturated:
            self._counters.meet("held")
            self._output.read_pause.pause("held")

    def expire(self, mono: float) -> None:
        """Refuse the requests whose deadline has passed. Later answers to them are dropped.

        :param mono: monotonic seconds.
        """
        for pending in self._session.unanswered(mono):
            self._counters.meet("respond")
            self._failed(Failure(DeadlineExceeded()), pending)

    def wait_idle(self) -> Deferred[None]:
        """Return a Deferred that fires when no request waits for its answer, or the link has ended."""
        idle = self._until_idle.wait()
        self.notify_if_idle()
        return idle

    def notify_if_idle(self) -> None:
        """Fire the Deferreds of :meth:`wait_idle` if no request waits for its answer or the link has ended."""
        if self._until_idle and (not self._session.pending or self._session.state is State.CLOSED):
            # Fire in the next reactor iteration, because the last answer is not written yet.
            self._clock.scheduler.callLater(0, self._until_idle.take().fire, None)

    def _answered(self, answer: Mapping[str, Any] | Failure, pending: PendingRequest) -> None:
        if isinstance(answer, Failure):
            self._failed(answer, pending)
            return
        try:
            self._answer(answer, pending)
        except Exception:
            self._failed(Failure(), pending)

    def _answer(self, payload: Mapping[str, Any], pending: PendingRequest) -> None:
        body = canonical.dumps(payload, envelope.PAYLOAD_DEPTH)
        size = envelope.size(pending.message.reply, body)
        if size > self._session.max_frame:
            raise TooBigToSend(size, self._session.max_frame)
        if self._is_awaited(pending):
            self._output.send_reply(pending.message.reply, body, pending.id)

    def _failed(self, failure: Failure, pending: PendingRequest) -> None:
        error = failure.value
        if not isinstance(error, WireError):
            incident = ulid_now()
            name = pending.message.name
            if self._output.may_tell(f"incidents in {name}", FRAMES):
                self.log.failure("incident {incident} in {type}", failure, incident=incident, type=name)
            error = InternalError(incident=incident)
        if self._is_awaited(pending):
            self._output.refuse(Refusal(error, pending.id))

    def _is_awaited(self, pending: PendingRequest) -> bool:
        """Untrack a request, and return whether the caller must still send the answer."""
        is_awaited = self._session.untrack(pending) and self._session.is_open
        # The calls below only schedule work for a later reactor iteration.
        if self._until_idle:
            self.notify_if_idle()
        if self._output.read_pause.is_stopped and not self._session.is_saturated:
            self._output.read_pause.resume("held")
        return is_awaited
