"""One link without I/O: its states, its checks of frames, its deadlines (docs/protocol.rst, "The life of a link").

:meth:`Session.receive` takes one frame and returns its outcome, on which :mod:`s2s.link.connection` acts. Two clocks
are passed in: ``now`` is Unix seconds, only for freshness; ``mono`` is monotonic seconds, for all durations.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from enum import Enum
from typing import Any, Final

import msgspec

from s2s.errors import AuthBad, Forbidden, NotReady, Replay, TsSkew, Unsigned, UnsupportedType, WireError
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import BY_NAME, ERROR, HEALTH_CHECK, REPLY_ONLY, Catalogue, MessageType
from s2s.protocol.envelope import Envelope, other
from s2s.protocol.limits import Bounds, Timing
from s2s.protocol.received import Received, Refusal, Reply, Request, UnknownKey, UnsignedError
from s2s.protocol.replay import ReplayCache
from s2s.protocol.signing import Key, Keyring, Role
from s2s.protocol.window import Window


class State(Enum):
    """The state of a link, seen from one side."""

    CHALLENGING = "challenging"  # connected; our health check is not answered yet
    PROVEN = "proven"  # the peer answered our health check, so it holds a key now
    CLOSING = "closing"  # nothing more is read; bytes already written may still be flushed
    CLOSED = "closed"


class Event(Enum):
    """An event that changes the state of a link."""

    PROOF = "proof"
    CLOSE = "close"
    LOST = "lost"


#: Every transition. Any other one is ignored. CLOSED is final.
TRANSITIONS: Final = {
    (State.CHALLENGING, Event.PROOF): State.PROVEN,
    (State.CHALLENGING, Event.CLOSE): State.CLOSING,
    (State.CHALLENGING, Event.LOST): State.CLOSED,
    (State.PROVEN, Event.CLOSE): State.CLOSING,
    (State.PROVEN, Event.LOST): State.CLOSED,
    (State.CLOSING, Event.LOST): State.CLOSED,
}


#: The longest frame, in bytes, that a peer is assumed to accept until it announces its limit.
UNANNOUNCED_FRAME_SIZE: Final = 65536


class PendingRequest(msgspec.Struct, eq=False):
    """A request that waits for our answer; it keeps only the members that the answer needs.

    :param id: the ``id`` of its envelope.
    :param size: the size of its frame, in bytes.
    :param deadline: monotonic seconds.
    """

    message: MessageType
    id: str
    size: int
    deadline: float


class Session:
    """One side of one link.

    :param role: our role.
    :param replay: the replay cache of the process.
    :param mono: monotonic seconds when the connection was made.
    :param catalogue: the message types that we know.
    """

    def __init__(
        self,
        role: Role,
        replay: ReplayCache,
        timing: Timing,
        bounds: Bounds,
        mono: float,
        catalogue: Catalogue = BY_NAME,
    ) -> None:
        self.role = role
        self.catalogue = catalogue
        self.peer_role = other(role)
        self.timing = timing
        self.bounds = bounds
        self.state = State.CHALLENGING
        #: Frames are still read and written: the state is CHALLENGING or PROVEN.
        self.is_open = True
        #: The ``key_id`` that the peer last signed with.
        self.peer_key_id: str | None = None
        #: The longest frame that may be sent, in bytes.
        self.max_frame = min(bounds.frame_size, UNANNOUNCED_FRAME_SIZE)
        self._replay = replay
        #: A health check was sent because of silence, and no valid frame has come since.
        self.is_checking = False
        self._opened = mono
        self._heard: float | None = None
        self._quiet_since = mono
        self._frame_since: float | None = None
        self._proof_ts: int | None = None
        self._stamped = 0
        self._skews = 0
        self._misses = 0
        self._unsigned = 0
        self._paused = False
        #: Our requests.
        self.calls = Window(bounds)
        #: The peer's requests that wait for our answer, in order of arrival.
        self._pending: dict[PendingRequest, None] = {}
        self._pending_bytes = 0

    # --- state ----------------------------------------------------------------------------------------------------

    def move(self, event: Event) -> bool:
        """Make a transition, or return ``False`` and change nothing if there is none for this event."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            return False
        self.state = state
        self.is_open = state is State.PROVEN
        return True

    @property
    def has_been_heard(self) -> bool:
        """Whether a valid frame has ever come."""
        return self._heard is not None

    def prove(self, ts: int) -> bool:
        """Record that an envelope with this ``ts`` answered our challenge.

        :returns: ``False`` if the link is not challenging any more.
        """
        if not self.move(Event.PROOF):
            return False
        self._proof_ts = ts
        return True

    def announce(self, frame_size: int) -> None:
        """Record the peer's frame size limit, in bytes."""
        self.max_frame = min(self.bounds.frame_size, frame_size)

    def stamp(self, now: float) -> int:
        """Return the ``ts`` of a frame. It never decreases on a link: a lower ``ts`` could be older than the proof."""
        self._stamped = max(self._stamped, int(now))
        return self._stamped

    # --- inbound frames ---------------------------------------------------------------------------------------------

    def receive(
        self,
        frame: bytes,
        keyring: Keyring,
        served: Collection[str],
        now: float,
        mono: float,
        unknown: UnknownKey | None = None,
    ) -> Received:
        """Verify and classify one frame, in the protocol's order of checks.

        The checks are, in this order: JSON, key, MAC; direction, ``ts``, replay, type and proof; the payload's schema.

        :param frame: the frame's body.
        :param served: the types that this process answers.
        :param unknown: the outcome for this frame before the keys were read again, if they were.
        """
        if unknown is not None and keyring.verify(unknown.sealed, now) is None:
            return Refusal(AuthBad(), key_id=unknown.sealed.key_id)
        # A canonical frame is parsed only after its MAC is verified. The MAC of any other frame covers its canonical
        # form, so that frame is parsed first.
        key = read = None
        plain = envelope.unseal_plainly(frame)
        if plain is not None:
            key = keyring.verify(plain, now)
            if key is not None:
                read = plain.read()
        if key is None or read is None:
            opened = _open_exactly(frame, keyring, now)
            if not isinstance(opened, tuple):
                return opened
            key, members = opened
            self.heard(key.key_id, mono)
            try:
                read = envelope.read(members)
            except WireError as error:
                is_answered = not is_reply(members.get("type"), "ack_of" in members)
                return Refusal(error, envelope.well_formed_id(members), is_answered)
        else:
            self.heard(key.key_id, mono)
        is_answered = not is_reply(read.type, read.ack_of is not None)
        try:
            self.check_way(read, key)
            if not is_answered:
                return Reply(read, self.calls.settle(read.ack_of))
            message = self.admit(read, key, served, now, mono)
            message.request_schema.check(read.payload)
        except WireError as error:
            return Refusal(error, read.id, is_answered, request=read if is_answered else None)
        return Request(read, message, {**message.request_schema.defaults, **read.payload}, key.key_id, len(frame))

    def heard(self, key_id: str, mono: float) -> None:
        """Record that a frame with a valid MAC arrived."""
        self._heard = self._quiet_since = mono
        self._misses = 0
        self.is_checking = False
        self.peer_key_id = key_id

    def check_way(self, got: Envelope, key: Key) -> None:
        """Check that ``src`` is the peer's role, ``dst`` is ours, and the key may sign for ``src``.

        :raises Forbidden: ``src``, ``dst`` or the key's role is wrong; this prevents reflection attacks.
        """
        if got.src != self.peer_role:
            raise Forbidden(f"on this link src must be {self.peer_role}", path="/src")
        if got.dst != self.role:
            raise Forbidden(f"on this link dst must be {self.role}", path="/dst")
        if not key.may_sign_for(got.src):
            raise Forbidden("the key may not sign for this src", path="/auth/key_id")

    def admit(self, got: Envelope, key: Key, served: Collection[str], now: float, mono: float) -> MessageType:
        """Check a request up to its payload, in the protocol's order: ts, replay, type and direction, proof.

        :param served: the types that this process answers.
        :raises WireError: the first check that fails.
        """
        self._check_fresh(got.ts, now, mono)
        message = self.catalogue.get(got.type)
        if message is None or message.entered:
            self._replay.enter(key.key_id, got.id, mono)
        if message is None or message.name not in served:
            raise UnsupportedType(f"the {self.role} does not serve this type", path="/type", supported=sorted(served))
        if message.control:
            if self._proof_ts is None:
                raise NotReady("our health check on this link is not answered yet", retry_after_ms=100)
            if got.ts < self._proof_ts:
                raise Replay("the request is older than the proof of this link", path="/ts")
        return message

    def _check_fresh(self, ts: int, now: float, mono: float) -> None:
        window = int(self._replay.window(mono))
        skew = int(now) - ts
        if abs(skew) <= window:
            self._skews = 0
            return
        self._skews += 1
        refusal = TsSkew(
            f"ts is {abs(skew)} s {'behind' if skew > 0 else 'ahead of'} our clock",
            path="/ts",
            server_ts=int(now),
            skew_s=skew,
            max_skew_s=window,
        )
        # For this code alone, the link's earlier frames decide whether the link closes.
        refusal.closes = self._skews >= self.bounds.skews_in_a_row
        raise refusal

    def unsigned_error(self) -> bool:
        """Count an ``s2s.error`` without ``auth``, and return whether the bound is reached."""
        self._unsigned += 1
        return self._unsigned >= self.bounds.unsigned_errors

    # --- requests that wait for our answer --------------------------------------------------------------------------

    def track(self, message: MessageType, id: str, size: int, mono: float) -> PendingRequest:
        """Add a request to those that wait for our answer, until :meth:`untrack` removes it."""
        pending = PendingRequest(message, id, size, mono + self.timing.respond)
        self._pending[pending] = None
        self._pending_bytes += size
        return pending

    def untrack(self, pending: PendingRequest) -> bool:
        """Remove a request because it is answered now, or return ``False`` if it was answered before."""
        if pending not in self._pending:
            return False
        del self._pending[pending]
        self._pending_bytes -= pending.size
        return True

    def unanswered(self, mono: float) -> list[PendingRequest]:
        """Return the requests whose deadline has passed."""
        # All requests have the same timeout, so the first to arrive is the first due.
        return list(itertools.takewhile(lambda pending: pending.deadline <= mono, self._pending))

    @property
    def pending(self) -> int:
        """The number of requests that wait for our answer."""
        return len(self._pending)

    @property
    def is_saturated(self) -> bool:
        """Whether reading must stop until a request is answered."""
        return len(self._pending) >= self.bounds.held_frames or self._pending_bytes >= self.bounds.held_bytes

    def paused(self, mono: float, is_paused: bool) -> None:
        """Record that reading was paused or resumed. While it is paused, the silence and frame timers do not run."""
        self._paused = is_paused
        if not is_paused:
            self._quiet_since = mono
            self._frame_since = None if self._frame_since is None else mono

    # --- timers -----------------------------------------------------------------------------------------------------

    def partial(self, mono: float, is_partial: bool, is_new: bool) -> None:
        """Start or stop the frame timer; the link calls this after each chunk.

        :param is_partial: a frame has begun and is not complete.
        :param is_new: the frame began in this chunk.
        """
        if not is_partial:
            self._frame_since = None
        elif is_new or self._frame_since is None:
            self._frame_since = mono

    def missed(self) -> bool:
        """Count an unanswered health check, and return whether to close the link."""
        # While reading is paused, the answer cannot arrive, so the check does not count.
        self._misses += not self._paused
        return self._misses >= self.timing.misses

    def overdue(self, mono: float) -> tuple[str, str] | None:
        """Return the name of the expired timeout and the reason to close the link, or ``None``."""
        if self.state is State.CHALLENGING and mono >= self._opened + self.timing.proof:
            return "proof", "our health check was not answered" if self.has_been_heard else "no valid frame came"
        if self._frame_since is not None and not self._paused and mono >= self._frame_since + self.timing.frame:
            return "frame", "a frame took too long to come whole"
        return None

    def wants_check(self, mono: float) -> bool:
        """Whether the peer was silent for so long that the caller must now send a health check."""
        if self.state is not State.PROVEN or self._paused or self.is_checking:
            return False
        if mono < self._quiet_since + self.timing.idle:
            return False
        # From now on the deadlines of consecutive health checks replace the idle timer, until a valid frame comes.
        self.is_checking = True
        return True

    def next_timer(self) -> float:
        """Return the earliest time at which a deadline may pass, in monotonic seconds."""
        times = [self.calls.next_deadline]
        if self.state is State.CHALLENGING:
            times.append(self._opened + self.timing.proof)
        if not self._paused:
            if self.state is State.PROVEN and not self.is_checking:
                times.append(self._quiet_since + self.timing.idle)
            if self._frame_since is not None:
                times.append(self._frame_since + self.timing.frame)
        if self._pending:
            times.append(next(iter(self._pending)).deadline)
        return min(times)


def _open_exactly(
    frame: bytes, keyring: Keyring, now: float
) -> tuple[Key, dict[str, Any]] | Refusal | UnsignedError | UnknownKey:
    """Return the key that verifies a frame's canonical form, and the frame's members, or the outcome of a refusal."""
    try:
        members, written = canonical.parse_and_write(frame)
        if is_unsigned_error(members):
            return UnsignedError(members.get("payload"))
        sealed = envelope.unseal_exactly(members, written)
        key = keyring.verify(sealed, now)
        if key is not None:
            return key, members
        if not keyring.has_begun(sealed.key_id, now):
            return UnknownKey(sealed)
        return Refusal(AuthBad(), key_id=sealed.key_id)
    except Unsigned as error:
        # The traceback refers to the parsed frame, which only the cyclic garbage collector would free.
        error.__traceback__ = error.__context__ = None
        return Refusal(error)


def is_reply(type: object, has_ack_of: bool) -> bool:
    """Whether a frame is a reply or claims to be one. Such a frame is never answered.

    :param type: the frame's member ``type``, of any JSON type.
    :param has_ack_of: whether the frame has a member ``ack_of``.
    """
    return has_ack_of or (isinstance(type, str) and type in REPLY_ONLY)


def is_unsigned_error(members: dict[str, Any]) -> bool:
    """Whether a parsed frame is an ``s2s.error`` without ``auth``, which answers no request and is never answered."""
    return members.get("type") == ERROR and "auth" not in members


#: A signed refusal with this code also answers a challenge: a peer that does not know the type still holds a key.
ALSO_PROVES: Final = UnsupportedType.code
CHALLENGE: Final = BY_NAME[HEALTH_CHECK]
