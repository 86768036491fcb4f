"""One link without I/O: its states, what it accepts, what it waits for (docs/protocol.rst, "The life of a link").

Bytes, signatures and timers are others' work: :mod:`s2s.link.connection` carries them out and asks here. Two clocks
are passed in: ``now`` is Unix seconds, for freshness alone; ``mono`` is monotonic seconds, for everything that lasts.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from enum import Enum
from typing import Any, Final

import msgspec

from s2s.errors import Forbidden, NotReady, Replay, TsSkew, UnsupportedType
from s2s.protocol.catalogue import BY_NAME, ERROR, HEALTH_CHECK, REPLY_ONLY, MessageType
from s2s.protocol.envelope import Envelope, other
from s2s.protocol.limits import Bounds, Timing
from s2s.protocol.replay import ReplayCache
from s2s.protocol.signing import Key, Role
from s2s.protocol.window import Window


class State(Enum):
    """Where a link stands, seen from one side."""

    CHALLENGING = "challenging"  # connected; our health check is not answered yet
    PROVEN = "proven"  # a key holder answers at the other end, now
    CLOSING = "closing"  # nothing more is read; what was written may still flush
    CLOSED = "closed"


class Event(Enum):
    """What moves a link from state to state."""

    PROOF = "proof"
    CLOSE = "close"
    LOST = "lost"


#: Every transition; what is missing here cannot happen. CLOSED has no way out.
TRANSITIONS: Final = {
    (State.CHALLENGING, Event.PROOF): State.PROVEN,
    (State.CHALLENGING, Event.CLOSE): State.CLOSING,
    (State.CHALLENGING, Event.LOST): State.CLOSED,
    (State.PROVEN, Event.CLOSE): State.CLOSING,
    (State.PROVEN, Event.LOST): State.CLOSED,
    (State.CLOSING, Event.LOST): State.CLOSED,
}


#: What a peer takes that has not said.
UNANNOUNCED_FRAME_SIZE: Final = 65536


class PendingRequest(msgspec.Struct, eq=False):
    """A request that waits for our answer, and no more of it than is needed then.

    :param id: its envelope's.
    :param size: the frame's, in bytes.
    :param deadline: monotonic seconds.
    """

    message: MessageType
    id: str
    size: int
    deadline: float


class Session:
    """One side of one link.

    :param role: ours.
    :param replay: the process's cache.
    :param mono: monotonic seconds at the connect.
    """

    def __init__(self, role: Role, replay: ReplayCache, timing: Timing, bounds: Bounds, mono: float) -> None:
        self.role = role
        self.peer_role = other(role)
        self.timing = timing
        self.bounds = bounds
        self.state = State.CHALLENGING
        #: Frames are still read and written: it is challenging or proven.
        self.is_open = True
        #: ``key_id`` that the peer signed with last.
        self.peer_key_id: str | None = None
        #: The longest frame that may be sent, in bytes.
        self.max_frame = min(bounds.frame_size, UNANNOUNCED_FRAME_SIZE)
        self._replay = replay
        #: A health check was sent because of silence, and nothing was heard since.
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
        #: Requests of ours.
        self.calls = Window(bounds)
        #: In the order in which they came.
        self._pending: dict[PendingRequest, None] = {}
        self._pending_bytes = 0

    # --- state ----------------------------------------------------------------------------------------------------

    def move(self, event: Event) -> bool:
        """Follow one transition; ``False`` where there is none, and nothing changes."""
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
        """Our challenge was answered by an envelope with this ``ts``; ``False`` if the link was proven before."""
        if not self.move(Event.PROOF):
            return False
        self._proof_ts = ts
        return True

    def announce(self, frame_size: int) -> None:
        """The peer says how long a frame it takes, in bytes."""
        self.max_frame = min(self.bounds.frame_size, frame_size)

    def stamp(self, now: float) -> int:
        """Give the ``ts`` of a frame: it never goes back on a link, where it would look older than the proof."""
        self._stamped = max(self._stamped, int(now))
        return self._stamped

    # --- what comes in ----------------------------------------------------------------------------------------------

    def heard(self, key_id: str, mono: float) -> None:
        """A frame whose MAC holds has come."""
        self._heard = self._quiet_since = mono
        self._misses = 0
        self.is_checking = False
        self.peer_key_id = key_id

    def check_way(self, envelope: Envelope, key: Key) -> None:
        """Refuse what another role says, or says to another, or signs with another's key.

        :raises Forbidden: ``src``, ``dst`` or the key's role is wrong; this defeats reflection.
        """
        if envelope.src != self.peer_role:
            raise Forbidden(f"on this link src must be {self.peer_role}", path="/src")
        if envelope.dst != self.role:
            raise Forbidden(f"on this link dst must be {self.role}", path="/dst")
        if not key.may_sign_for(envelope.src):
            raise Forbidden("the key may not sign for this src", path="/auth/key_id")

    def admit(self, envelope: Envelope, key: Key, served: Collection[str], now: float, mono: float) -> MessageType:
        """Check a request up to its payload, in the protocol's order: ts, replay, type and way, proof.

        :param served: the types that this process answers.
        :raises WireError: the first check that fails.
        """
        self._check_fresh(envelope.ts, now, mono)
        message = BY_NAME.get(envelope.type)
        if message is None or message.entered:
            self._replay.enter(key.key_id, envelope.id, mono)
        if message is None or message.name not in served:
            raise UnsupportedType(f"the {self.role} does not serve this type", path="/type", supported=sorted(served))
        if message.control:
            if self._proof_ts is None:
                raise NotReady("our health check on this link is not answered yet", retry_after_ms=100)
            if envelope.ts < self._proof_ts:
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
        # The rule of this one code depends on the link's past.
        refusal.closes = self._skews >= self.bounds.skews_in_a_row
        raise refusal

    def unsigned_error(self) -> bool:
        """An ``s2s.error`` without ``auth`` has come: whether it is one too many."""
        self._unsigned += 1
        return self._unsigned >= self.bounds.unsigned_errors

    # --- requests that we hold --------------------------------------------------------------------------------------

    def track(self, message: MessageType, id: str, size: int, mono: float) -> PendingRequest:
        """A request waits for our answer, which :meth:`untrack` ends."""
        pending = PendingRequest(message, id, size, mono + self.timing.respond)
        self._pending[pending] = None
        self._pending_bytes += size
        return pending

    def untrack(self, pending: PendingRequest) -> bool:
        """A request is to be answered: ``False`` if it was answered before."""
        if pending not in self._pending:
            return False
        del self._pending[pending]
        self._pending_bytes -= pending.size
        return True

    def unanswered(self, mono: float) -> list[PendingRequest]:
        """Give what has waited for too long."""
        # All wait equally long, so that the first come is the first due.
        return list(itertools.takewhile(lambda pending: pending.deadline <= mono, self._pending))

    @property
    def pending(self) -> int:
        """How many requests wait for our answer."""
        return len(self._pending)

    @property
    def is_saturated(self) -> bool:
        """Whether no more is to be read until something is answered."""
        return len(self._pending) >= self.bounds.held_frames or self._pending_bytes >= self.bounds.held_bytes

    def paused(self, mono: float, is_paused: bool) -> None:
        """Reading stops or goes on; while it stops, silence and frame time are not counted."""
        self._paused = is_paused
        if not is_paused:
            self._quiet_since = mono
            self._frame_since = None if self._frame_since is None else mono

    # --- timers -----------------------------------------------------------------------------------------------------

    def partial(self, mono: float, is_partial: bool, is_new: bool) -> None:
        """After each chunk: whether a frame has begun and is not whole, and whether it began in this chunk."""
        if not is_partial:
            self._frame_since = None
        elif is_new or self._frame_since is None:
            self._frame_since = mono

    def missed(self) -> bool:
        """A health check went unanswered: whether the peer is to be given up."""
        # What we do not read, we cannot hear.
        self._misses += not self._paused
        return self._misses >= self.timing.misses

    def overdue(self, mono: float) -> tuple[str, str] | None:
        """Say which wait is over and why the link must be closed now, if it must."""
        if self.state is State.CHALLENGING and mono >= self._opened + self.timing.proof:
            return "proof", "our health check was not answered" if self.has_been_heard else "no valid frame came"
        if self._frame_since is not None and not self._paused and mono >= self._frame_since + self.timing.frame:
            return "frame", "a frame took too long to come whole"
        return None

    def wants_check(self, mono: float) -> bool:
        """Whether the peer was silent for so long that it must be asked; asking is the caller's next act."""
        if self.state is not State.PROVEN or self._paused or self.is_checking:
            return False
        if mono < self._quiet_since + self.timing.idle:
            return False
        # From here on the checks' own deadlines watch, one after the other, until something is heard.
        self.is_checking = True
        return True

    def next_timer(self) -> float:
        """When one of the timed methods may have something to say, in monotonic seconds."""
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


def is_reply(type: object, has_ack_of: bool) -> bool:
    """Whether a frame answers, or claims to: such a one is never answered.

    :param type: its member ``type``, whatever that is.
    :param has_ack_of: whether it has a member ``ack_of``.
    """
    return has_ack_of or (isinstance(type, str) and type in REPLY_ONLY)


def is_unsigned_error(members: dict[str, Any]) -> bool:
    """Whether a parsed frame is an ``s2s.error`` without ``auth``: it answers no request and is never answered."""
    return members.get("type") == ERROR and "auth" not in members


#: A signed refusal with this code answers a challenge too: a peer that does not know the type holds a key all the same.
ALSO_PROVES: Final = UnsupportedType.code
CHALLENGE: Final = BY_NAME[HEALTH_CHECK]
