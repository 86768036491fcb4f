"""The peer's requests on one link, and our answers (docs/protocol.rst, "Requests and replies", "Windows")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from ulid_transform import ulid_now

from s2s.errors import DeadlineExceeded, InternalError, TooBigToSend, WireError
from s2s.link.dispatcher import Refusal, Request, Responder
from s2s.link.read_pause import ReadPause
from s2s.protocol import canonical, envelope
from s2s.protocol.limits import Counters
from s2s.protocol.session import PendingRequest, Session, State
from s2s.runtime.clock import Clock


class InboundRequests:
    """The peer's requests that wait for our answer. Each is answered once and in time, and their number is bounded.

    :param reader: pauses reading while the bound is reached.
    :param send: writes a reply: its type, its payload's canonical bytes, and the ``id`` of the request.
    :param refuse: answers with an error.
    :param may_tell: returns whether the log may have a line, and a traceback, for a cause.
    """

    log = Logger()

    def __init__(
        self,
        session: Session,
        responders: Mapping[str, Responder],
        clock: Clock,
        counters: Counters,
        reader: ReadPause,
        send: Callable[[str, bytes, str], None],
        refuse: Callable[[Refusal], None],
        may_tell: Callable[[str], bool],
    ) -> None:
        self._session = session
        self._responders = responders
        self._clock = clock
        self._counters = counters
        self._read_pause = reader
        self._send = send
        self._refuse = refuse
        self._may_tell = may_tell
        self._until_idle: list[Deferred[None]] = []

    def serve(self, request: Request) -> None:
        """Call the responder of a request, and send its answer."""
        answer: Mapping[str, Any] | Failure | Deferred[dict[str, Any]]
        try:
            answer = self._responders[request.message.name](request)
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
            self._read_pause.pause("held")

    def expire(self, mono: float) -> None:
        """Refuse the requests whose deadline has passed. Later answers to them are dropped.

        :param mono: monotonic seconds.
        """
        for pending in self._session.unanswered(mono):
            self._counters.meet("respond")
            self._failed(Failure(DeadlineExceeded()), pending)

    def wait_idle(self) -> Deferred[None]:
        """Return a Deferred that fires when no request waits for its answer, or the link has ended."""
        waiter: Deferred[None] = Deferred()
        self._until_idle.append(waiter)
        self.notify_if_idle()
        return waiter

    def notify_if_idle(self) -> None:
        """Fire the Deferreds of :meth:`wait_idle` if no request waits for its answer or the link has ended."""
        if self._until_idle and (not self._session.pending or self._session.state is State.CLOSED):
            waiters, self._until_idle = self._until_idle, []
            for waiter in waiters:
                # Fire in the next reactor iteration, because the last answer is not written yet.
                self._clock.scheduler.callLater(0, waiter.callback, None)

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
            self._send(pending.message.reply, body, pending.id)

    def _failed(self, failure: Failure, pending: PendingRequest) -> None:
        error = failure.value
        if not isinstance(error, WireError):
            incident = ulid_now()
            name = pending.message.name
            if self._may_tell(f"incidents in {name}"):
                self.log.failure("incident {incident} in {type}", failure, incident=incident, type=name)
            error = InternalError(incident=incident)
        if self._is_awaited(pending):
            self._refuse(Refusal(error, pending.id))

    def _is_awaited(self, pending: PendingRequest) -> bool:
        """Untrack a request, and return whether the caller must still send the answer."""
        is_awaited = self._session.untrack(pending) and self._session.is_open
        # The calls below only schedule work for a later reactor iteration.
        if self._until_idle:
            self.notify_if_idle()
        if self._read_pause.is_stopped and not self._session.is_saturated:
            self._read_pause.resume("held")
        return is_awaited
