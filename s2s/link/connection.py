"""One link on a transport: frames, timers, backpressure, calls (docs/protocol.rst, "The life of a link").

:mod:`s2s.protocol.session` decides which messages are allowed; this module moves the bytes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final, Literal, Protocol

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionClosed
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure
from ulid_transform import ulid_now

from s2s.errors import (
    BY_CODE,
    AuthBad,
    BadReply,
    CallError,
    CanonicalError,
    DeadlinePassed,
    InvalidPayload,
    LineFull,
    LinkLost,
    LocalError,
    NoSigningKey,
    Refused,
    TooBigToSend,
    TooLarge,
    TsSkew,
    WireError,
    harmless,
)
from s2s.link.certificate_dates import why_invalid
from s2s.link.dispatcher import Dispatcher, KeySource
from s2s.link.inbound import InboundRequests
from s2s.link.peer_lines import ANSWERS, ENDS, FRAMES, PeerLines
from s2s.link.read_pause import ReadPause
from s2s.link.strangers import Strangers
from s2s.link.write_buffer import WriteBuffer
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import ACK, ERROR, ERROR_SCHEMA, HEALTH_CHECK
from s2s.protocol.envelope import Envelope
from s2s.protocol.limits import Counters
from s2s.protocol.received import Refusal, Reply, Request, UnknownKey, UnsignedError
from s2s.protocol.session import ALSO_PROVES, CHALLENGE, Event, Session, State
from s2s.protocol.window import Call
from s2s.runtime.budget import peer_network
from s2s.runtime.clock import Clock, Timer, cancel

#: The kernel closes a connection with a segment that is unacknowledged for this many milliseconds (RFC 5482).
_TCP_USER_TIMEOUT_MS: Final = 20_000
#: Maximum seconds that a frame waits for the keys to be read again.
_KEYS_S: Final = 3.0
#: The reason of a link that ended without either side closing it with a reason.
_LOST: Final = "the connection was lost"
#: Error codes after which a reconnect uses the slow backoff class, because an early retry cannot succeed.
_SLOW_CODES: Final = frozenset({"forbidden", "ts_skew"})
_ACK_MEMBERS: Final = frozenset(CHALLENGE.reply_schema.document["properties"])
#: Protocols by the first bytes of their streams.
_OTHERS: Final = {
    b"HTTP": "HTTP",
    b"GET ": "HTTP",
    b"HEAD": "HTTP",
    b"POST": "HTTP",
    b"PUT ": "HTTP",
    b"\x15\x03": "TLS",
    b"\x16\x03": "TLS",
}
#: Remedy for an engine that connected to a port of another service.
_OTHER_PORT: Final = "see whether this is the port on which a server listens for engines"
#: Remedies for a link of which only one side uses TLS.
_NO_TLS_HERE: Final = "the server listens without TLS, and the engine connects with it: see --listen ssl: and --connect"
_NO_TLS_THERE: Final = "where the server listens with TLS, the engine needs --connect tls:HOST:PORT"
#: Remedy for two sides without a common key.
_SAME_KEY: Final = "both sides need one key with one secret, see s2s keys list and s2s keys add --secret-file"


class LinkEvents(Protocol):
    """The callbacks for the life of a link."""

    def link_made(self, link: Link) -> None:
        """The transport is connected; nothing is known about the peer yet."""

    def link_proven(self, link: Link) -> None:
        """The peer answered our health check; ``link.peer`` holds the members of its answer."""

    def link_lost(self, link: Link) -> None:
        """The link has ended; ``link.close_reason`` holds the reason."""


@dataclass
class CloseReason:
    """The reason why a link ended.

    :ivar text: the reason, for the log.
    :ivar backoff_class: the backoff class of the next connect (protocol, "Reconnecting").
    :ivar is_logged: whether the log needs no further line about the end.
    """

    text: str
    backoff_class: Literal["fast", "slow"] = "fast"
    is_logged: bool = False


class Link(Int32StringReceiver):
    """One link, of either role.

    :param events: the callbacks for the link's life.
    :ivar peer: the members of the ``s2s.health.ack`` that proved the link, only those that the schema names; empty
        until then.
    :ivar close_reason: the reason of its end, final once the link has ended.
    :ivar late_ack: called with the link and the payload of an ``s2s.ack`` that no request awaits any more.
    """

    log = Logger()
    transport: Any

    def __init__(
        self,
        session: Session,
        dispatcher: Dispatcher,
        keys: KeySource,
        clock: Clock,
        events: LinkEvents,
        counters: Counters,
        strangers: Strangers,
        peer_lines: PeerLines,
    ) -> None:
        self.session = session
        self.MAX_LENGTH = session.bounds.frame_size
        self.peer: Mapping[str, Any] = {}
        self.close_reason = CloseReason(_LOST)
        self.late_ack: Callable[[Link, Mapping[str, Any]], object] = lambda *_: None
        self._dispatcher = dispatcher
        self._keys = keys
        self._clock = clock
        self._events = events
        self._counters = counters
        self._strangers = strangers
        self._peer_lines = peer_lines
        #: The network under which the peer is counted. Behind a proxy this is the proxy's network until the first bytes
        #: arrive, because the proxy sends the peer's address in front of them.
        self.network = ""
        #: Bytes received before the first valid frame, and the number of chunks of them that wait for their turn.
        self._strange_bytes = 0
        self._waits = 0
        #: The ``key_id`` with which we last signed.
        self._signed_by = ""
        self._write_buffer: WriteBuffer
        self._frames = 0
        #: A chunk is being processed, and more of its frames may follow.
        self._is_in_chunk = False
        self.read_pause = ReadPause(self, session, clock)
        self._timer: Timer | None = None
        #: The time for which the timer is set, in monotonic seconds.
        self._alarm = float("inf")
        self._answers = InboundRequests(session, dispatcher, clock, counters, self)

    # --- the transport ----------------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Challenge the peer (protocol, "Two challenges")."""
        self._tune()
        self.network = peer_network(self.transport)
        self._write_buffer = WriteBuffer(self.transport, self._counters)
        self._events.link_made(self)
        if self.session.is_open:
            challenge = self.call(HEALTH_CHECK, {}, timeout=self.session.timing.proof)
            challenge.addErrback(self._challenge_failed)

    def _tune(self) -> None:
        with contextlib.suppress(AttributeError):  # the transport is not TCP
            self.transport.setTcpNoDelay(True)
            self.transport.setTcpKeepAlive(True)
        handle = getattr(self.transport, "getHandle", lambda: None)()
        if isinstance(handle, socket.socket) and handle.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError, AttributeError):  # this system has no such option
                handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _TCP_USER_TIMEOUT_MS)

    def dataReceived(self, data: bytes) -> None:
        """Process a chunk. A link that is closing ignores it (twisted#8105)."""
        if not self.session.is_open:
            return
        if data and not self.session.has_been_heard:
            self._take_in_turn(data)
        before = self._frames
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) == end <= 4 + self.MAX_LENGTH and not self.paused and not self.recvd:
            # The chunk is exactly one frame, as is usual at a low load: nothing is split or buffered.
            self.stringReceived(data[4:])
        else:
            self._is_in_chunk = True
            try:
                super().dataReceived(data)  # type: ignore[no-untyped-call]
            finally:
                self._is_in_chunk = False
            if not self.session.pending:
                self._write_buffer.flush()
        if self.session.is_open:
            mono = self._clock.mono()
            self.session.partial(mono, bool(self.recvd), self._frames != before)
            if self._alarm > mono + self.session.timing.soonest:
                self._arm()

    def _take_in_turn(self, data: bytes) -> None:
        """Stop reading, and delivering the bytes already read, until it is the turn of a stranger's bytes."""
        before, self._strange_bytes = self._strange_bytes, self._strange_bytes + len(data)
        if not before:
            self.network = peer_network(self.transport)
        if not self._strangers.may_take(self.network, before, data, lambda: self.session.is_open, self._have_turn):
            self._waits += 1
            self.read_pause.pause("stranger")

    def _have_turn(self) -> None:
        # TLS may deliver one read in several chunks, and each of them may wait.
        self._waits -= 1
        if not self._waits:
            self.read_pause.resume("stranger")

    def may_tell(self, why: str, kind: str = ENDS) -> bool:
        """Whether the log may have a line for an event of this link. A peer has few lines, counted on all of its links.

        A stranger that connects and disconnects without sending a byte, as a port probe does, has no line at all.

        :param why: the cause of the event.
        :param kind: the kind of event, see :class:`~s2s.link.peer_lines.PeerLines`.
        """
        if self.session.has_been_heard or self.session.role == "engine":
            key_id = self.session.peer_key_id
            who = "a peer" if key_id is None else f"the key {harmless(key_id)}"
            return self._peer_lines.may_tell(f"{who} from {self.network or 'a local socket'}", kind, why)
        return (self._strange_bytes > 0 or why != _LOST) and self._strangers.may_tell(why)

    def lengthLimitExceeded(self, length: int) -> None:
        """Refuse a frame by its length prefix, before its body is buffered."""
        self._counters.meet("frame_size")
        self.refuse(Refusal(TooLarge(limit=self.MAX_LENGTH)), self._what_it_speaks(length.to_bytes(4, "big")))

    def _what_it_speaks(self, first: bytes) -> str:
        # A length prefix that begins with 0 may be that of an s2s frame which only exceeds our limit.
        if self._frames or first[0] == 0:
            return ""
        spoken = next((name for start, name in _OTHERS.items() if first.startswith(start)), "another protocol")
        if self.session.role == "engine":
            return f": it begins with {first!r} and speaks {spoken}: {_OTHER_PORT}"
        return f": it begins with {first!r} and speaks {spoken}{f': {_NO_TLS_HERE}' if spoken == 'TLS' else ''}"

    def stringReceived(self, string: bytes) -> None:
        """Handle one frame."""
        self._frames += 1
        # After a frame that closed the link, the parser still delivers the later frames of the same chunk.
        if self.session.is_open:
            self._counters.frames_in += 1
            self._handle_frame(string)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Fail every waiting call; the outcome of the calls that were sent is unknown."""
        if self.session.is_open and not reason.check(ConnectionClosed):
            # TLS refused the peer, or the peer refused us. The next attempt would fail too.
            self.close_reason.backoff_class = "slow"
            self.close_reason.text = f"TLS failed: {harmless(reason.getErrorMessage())}"
            if "certificate verify failed" in self.close_reason.text:
                chain = self.transport.getHandle().get_verified_chain(as_cryptography=True) or []
                why = why_invalid(chain, datetime.fromtimestamp(self._clock.now(), timezone.utc))
                self.close_reason.text += f": {why}" if why else ""
            elif "wrong version number" in self.close_reason.text:
                self.close_reason.text += f": {_NO_TLS_HERE if self.session.role == 'engine' else _NO_TLS_THERE}"
        elif self.session.role == "engine" and self.close_reason.text == _LOST and not self._frames:
            self.close_reason.text = f"{_LOST} before a frame came: {_NO_TLS_THERE}"
        self.session.move(Event.LOST)
        self._fail_calls()
        self._cancel_timer()
        self._write_buffer.stopProducing()
        self._answers.notify_if_idle()
        self._events.link_lost(self)

    def close(self, why: str) -> None:
        """Stop reading now, flush written bytes for at most ``timing.flush`` seconds, then cut the connection."""
        is_unproven = self.session.state is State.CHALLENGING
        if not self.session.move(Event.CLOSE):
            return
        # If the link closes before our challenge is answered, the next attempt would fail too, whatever the cause.
        if is_unproven:
            self.close_reason.backoff_class = "slow"
        self.close_reason.text = why
        self._fail_calls()
        self._cancel_timer()
        self._write_buffer.finish()
        self.transport.loseConnection()
        self._timer = self._clock.scheduler.callLater(self.session.timing.flush, self._not_flushed)

    def abort(self, why: str) -> None:
        """Cut the connection at once."""
        if self.session.is_open:
            self.close(why)
        self._cut()

    def _not_flushed(self) -> None:
        self._counters.meet("flush")
        self._cut()

    def _cut(self) -> None:
        self.transport.abortConnection()

    def wait_idle(self) -> Deferred[None]:
        """Return a Deferred that fires when no request of the peer waits for our answer, or the link has ended."""
        return self._answers.wait_idle()

    def _fail_calls(self) -> None:
        for call in self.session.calls.fail_all():
            call.waiter.errback(LinkLost(f"the link ended: {self.close_reason.text}"))

    # --- inbound frames ---------------------------------------------------------------------------------------------

    def _handle_frame(self, frame: bytes, unknown: UnknownKey | None = None) -> None:
        outcome = self._dispatcher.receive(frame, self.session, unknown)
        match outcome:
            case Request():
                self._answers.serve(outcome)
            case Reply(call=None):
                self._counters.orphan_replies += 1
                # An error without ack_of refuses the whole link.
                is_answer = outcome.envelope.type != ERROR or outcome.envelope.ack_of is not None
                if is_answer and self.may_tell("answers that nobody awaits", ANSWERS):
                    self.log.info("{peer}: dropped an answer that nobody awaits: {why}", peer=self, why=_why(outcome))
                self._unawaited(outcome.envelope)
            case Reply():
                self._settle(outcome)
            case Refusal():
                self.refuse(outcome)
            case UnknownKey():
                self.read_pause.pause("keys")
                # The timeout cancels this Deferred and not the read itself: a cancelled read would be logged as a
                # failure.
                reading: Deferred[None] = Deferred()
                self._keys.refresh().addBoth(reading.callback)
                reading.addTimeout(_KEYS_S, self._clock.scheduler)
                reading.addBoth(lambda _: self._retry_frame(frame, outcome)).addErrback(self._on_unexpected_error)
            case UnsignedError():
                self._unsigned_error(outcome)

    def _retry_frame(self, frame: bytes, unknown: UnknownKey) -> None:
        if self.session.is_open:
            self._handle_frame(frame, unknown)
            self.read_pause.resume("keys")

    def _on_unexpected_error(self, failure: Failure) -> None:
        if self.may_tell("internal error while a frame was handled", FRAMES):
            self.log.failure("{peer}: internal error while a frame was handled", failure, peer=self)
        self.abort("an error of ours")

    def _unawaited(self, got: Envelope) -> None:
        """Pass on a late ack; after a refusal of the whole link, only make the next reconnect slow."""
        if got.type == ACK:
            self.late_ack(self, got.payload)
            return
        if got.type != ERROR or got.ack_of is not None or not ERROR_SCHEMA.is_valid(got.payload):
            return
        if got.payload["code"] in _SLOW_CODES:
            self._counters.errors_in[got.payload["code"]] += 1
            self.close_reason.backoff_class = "slow"
            self.close_reason.text = f"the peer refuses the link: {harmless(got.payload['message'])}"

    def dismiss(self, error: WireError, why: str) -> None:
        """Close the link with an error that answers no request (protocol, "Identity").

        :param why: the reason for the log.
        """
        if self.session.is_open:
            self._counters.errors_out[error.code] += 1
            self._send(ERROR, self._error_body(error), ulid_now())
            self.close(why)

    def refuse(self, refusal: Refusal, more: str = "") -> None:
        """Refuse a frame.

        :param more: further text for the log line.
        """
        error = refusal.error
        self._counters.errors_out[error.code] += 1
        if not error.passing and self.may_tell(error.code, FRAMES):
            if refusal.key_id is not None:
                more = f": {self._why_not_verified(refusal.key_id)}; {_SAME_KEY}"
            text = error.message
            self.log.warn("{peer}: refused, {code}: {text!r}{more}", peer=self, code=error.code, text=text, more=more)
        if refusal.is_answered:
            self._send(ERROR, self._error_body(error), ulid_now(), refusal.ack_of, is_signed=error.signed)
        if error.closes:
            self.close_reason.is_logged = True
            if isinstance(error, TsSkew):
                self._counters.meet("ts_skew")
            self.close(f"we refused a frame with {error.code}")

    def _why_not_verified(self, key_id: str) -> str:
        why = self._keys.keyring.why_inactive(key_id, self._clock.now())
        if why is None:
            return f"the MAC of the key {key_id} is wrong: its secret differs from ours, or the frame was changed"
        return f"the key {key_id} {why}"

    def _error_body(self, error: WireError) -> bytes:
        try:
            body = canonical.dumps(error.payload(), envelope.PAYLOAD_DEPTH)
            if envelope.size(ERROR, body) <= self.session.max_frame:
                return body
        except CanonicalError as mistake:
            if self.may_tell("errors whose details cannot be said", FRAMES):
                text = "the details of the error {code} cannot be encoded: {mistake}"
                self.log.error(text, code=error.code, mistake=str(mistake))
        # The peer needs at least the code.
        return canonical.dumps({"code": error.code, "message": error.code, "details": {"retryable": error.retryable}})

    def _unsigned_error(self, outcome: UnsignedError) -> None:
        # Anyone on the network path can forge an unsigned error. One such error is logged, counted and makes the next
        # reconnect slow; only several of them close the link.
        self._counters.unsigned_errors += 1
        self.close_reason.backoff_class = "slow"
        said = outcome.payload if ERROR_SCHEMA.is_valid(outcome.payload) else {}
        code = said["code"] if isinstance(said, dict) and said else "?"
        if self.may_tell("unsigned errors", FRAMES):
            more = f": it does not accept our key {self._signed_by}; {_SAME_KEY}" if code == AuthBad.code else ""
            self.log.warn(
                "{peer}: received an unsigned error with the code {code!r}{more}", peer=self, code=code[:64], more=more
            )
        if self.session.unsigned_error():
            self._counters.meet("unsigned_errors")
            self.close("unsigned errors came")

    # --- outbound frames --------------------------------------------------------------------------------------------

    def call(self, type: str, payload: Mapping[str, Any], timeout: float | None = None) -> Deferred[dict[str, Any]]:
        """Send a request and wait for its reply.

        :param type: a type that our role may send (docs/protocol.rst, "Catalogue").
        :param timeout: seconds, including the wait for the window; the default is ``link.call_s`` (3 s).
        :returns: a Deferred that fires with the reply's payload, or fails with a :class:`~s2s.errors.CallError`
            (``Refused``, ``BadReply``, ``UnknownOutcome``) or, if nothing was written, with a
            :class:`~s2s.errors.LocalError`.
        """
        message = self.session.catalogue[type]
        if not self.session.is_open:
            return defer.fail(LinkLost(f"the link ended: {self.close_reason.text}"))
        try:
            if not message.request_schema.is_valid(payload):
                path, text = message.request_schema.explain(payload) or ("/payload", "")
                raise InvalidPayload(f"{type} at {path}: {text}")
            body = canonical.dumps(payload, envelope.PAYLOAD_DEPTH)
            size = envelope.size(type, body)
            if size > self.session.max_frame:
                raise TooBigToSend(size, self.session.max_frame)
            patience = self.session.timing.call if timeout is None else timeout
            waiter: Deferred[dict[str, Any]] = Deferred()
            call = Call(message, body, size, self._clock.mono() + patience, waiter)
            if self.session.calls.offer(call):
                self._send_call(call)
            else:
                self._counters.meet("window")
        except LocalError as error:
            if isinstance(error, LineFull):
                self._counters.meet("line")
            return defer.fail()
        if call.deadline < self._alarm:
            self._arm()
        return waiter

    def _send_call(self, call: Call) -> None:
        # An attacker who could predict the id of a challenge could obtain an answer to it in advance.
        message_id = envelope.unguessable_id(int(self._clock.now() * 1000)) if call.message is CHALLENGE else ulid_now()
        body = self.session.calls.sent(call, message_id)
        # No other request is in flight, so flush now: the peer is idle until it receives this one.
        self._send(call.message.name, body, message_id, is_urgent=self.session.calls.in_flight == 1)

    def _send_line(self) -> None:
        while self.session.is_open and (call := self.session.calls.next_in_line()) is not None:
            self._send_call(call)

    def _send(
        self,
        type: str,
        body: bytes,
        message_id: str,
        ack_of: str | None = None,
        *,
        is_signed: bool = True,
        is_urgent: bool = False,
    ) -> None:
        role, now = self.session.role, self._clock.now()
        try:
            key = self._keys.keyring.signer(role, now) if is_signed else None
        except NoSigningKey as error:
            if self.may_tell("no key may sign"):
                self.log.error("{peer}: {error}", peer=self, error=str(error))
            self.close_reason.is_logged = True
            self.close("no key may sign")
            return
        if key is not None:
            self._signed_by = key.key_id
        frame = envelope.seal(
            id=message_id,
            ts=self.session.stamp(now),
            src=role,
            dst=self.session.peer_role,
            type=type,
            body=body,
            key=key,
            ack_of=ack_of,
        )
        self._counters.frames_out += 1
        self._write_buffer.write(len(frame).to_bytes(4, "big") + frame, is_urgent)
        bounds, waiting = self.session.bounds, self._write_buffer.waiting_bytes
        if waiting > min(bounds.write_bytes, bounds.all_write_bytes - self._counters.waiting_bytes):
            self._counters.meet("write_buffer")
            self.abort("the peer does not read")

    def send_reply(self, type: str, body: bytes, ack_of: str) -> None:
        """Send a reply to the request with this ``id``; see :class:`~s2s.link.inbound.LinkOutput`."""
        # If no other request waits for our answer, flush now, because the peer may be idle. The answers to the frames
        # of one chunk are sent together at the end of the chunk.
        is_urgent = not (self.session.pending or self._is_in_chunk)
        self._send(type, body, ulid_now(), ack_of, is_urgent=is_urgent)

    def _settle(self, reply: Reply) -> None:
        call, outcome = reply.call, reply.outcome()
        assert call is not None
        refusal = outcome.code if isinstance(outcome, Refused) else None
        if refusal is not None:
            # Unknown codes are counted together, because a peer could send any number of different ones.
            self._counters.errors_in[refusal if refusal in BY_CODE else "other"] += 1
        # A later reply without such a code shows that the cause has gone, and resets the backoff class.
        self.close_reason.backoff_class = "slow" if refusal in _SLOW_CODES else "fast"
        if call.message is CHALLENGE and (not isinstance(outcome, CallError) or refusal == ALSO_PROVES):
            self._proven(reply.envelope.ts, outcome if isinstance(outcome, dict) else {})
        self._send_line()
        # A failed challenge closes the link, and the log line about the end names the reason.
        is_challenge = call.message is CHALLENGE and self.session.state is State.CHALLENGING
        if isinstance(outcome, BadReply) and not is_challenge and self.may_tell(call.message.name, ANSWERS):
            self.log.warn("{peer}: its answer is not valid: {why}", peer=self, why=str(outcome))
        if isinstance(outcome, CallError):
            call.waiter.errback(outcome)
        else:
            call.waiter.callback(outcome)

    # --- proof and timers -------------------------------------------------------------------------------------------

    def _proven(self, ts: int, said: dict[str, Any]) -> None:
        limit = said.get("frame_size_limit")
        if isinstance(limit, int):
            self.session.announce(limit)
        if self.session.prove(ts):
            self.peer = _known(said)
            self._events.link_proven(self)

    def _challenge_failed(self, failure: Failure) -> None:
        failure.trap(CallError, LocalError)
        error = failure.value
        if self.session.is_open and not (isinstance(error, Refused) and error.code == ALSO_PROVES):
            self._give_up(f"our health check failed: {error}")

    def _give_up(self, why: str) -> None:
        is_mute = self.session.role == "engine" and not self._strange_bytes
        self.close(f"{why}: nothing came at all: {_OTHER_PORT}" if is_mute else why)

    def _arm(self) -> None:
        if not self.session.is_open:
            return
        at = self.session.next_timer()
        if at == float("inf"):
            return
        if self._timer is None or not self._timer.active():
            self._alarm = at
            self._timer = self._clock.scheduler.callLater(max(0.0, at - self._clock.mono()), self._tick)
        elif at < self._alarm:
            self._alarm = at
            self._timer.reset(max(0.0, at - self._clock.mono()))

    def _cancel_timer(self) -> None:
        cancel(self._timer)

    def _tick(self) -> None:
        self._alarm = float("inf")
        mono = self._clock.mono()
        for call in self.session.calls.expire(mono):
            self._counters.meet("call")
            call.waiter.errback(DeadlinePassed(f"{call.message.name} was not answered in time"))
        self._answers.expire(mono)
        overdue = self.session.overdue(mono)
        if overdue is not None:
            self._counters.meet(overdue[0])
            self._give_up(overdue[1])
        elif self.session.wants_check(mono):
            self._check()
        self._send_line()
        self._arm()

    def _check(self) -> None:
        check = self.call(HEALTH_CHECK, {}, timeout=self.session.timing.check)
        check.addErrback(self._check_failed)

    def _check_failed(self, failure: Failure) -> None:
        # Any valid frame shows that the peer is alive. A link that ended is logged elsewhere.
        failure.trap(CallError, LocalError)
        if failure.check(DeadlinePassed) and self.session.is_checking:
            if self.session.missed():
                self._counters.meet("silence")
                self.abort(f"the peer left {self.session.timing.misses} health checks unanswered")
            else:
                self._check()

    def __str__(self) -> str:
        """Return the name of the peer for log lines."""
        name = self.peer.get("name") or self.session.peer_key_id or "a peer"
        return f"{harmless(name)} at {self.address}"

    @property
    def address(self) -> str:
        """The address of the peer."""
        at = self.transport.getPeer() if self.transport is not None else None
        host, port, name = (getattr(at, part, None) for part in ("host", "port", "name"))
        return f"{host}:{port}" if host is not None else os.fsdecode(name or "a local socket")


def _known(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of a health ack that its schema names; the others may be as long as a frame."""
    return {name: value for name, value in said.items() if name in _ACK_MEMBERS}


def _why(reply: Reply) -> str:
    """Return the reason why no request awaits a reply."""
    if reply.envelope.ack_of is None:
        return f"its {harmless(reply.envelope.type)} has no ack_of"
    return "it came too late, or twice, or its ack_of is the id of no request"
