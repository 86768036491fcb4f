"""One link without I/O: its states, what it accepts, what it waits for (docs/protocol.rst, "The life of a link").

Bytes, signatures and timers are others' work: :mod:`s2s.protocol` carries them out and asks here. Two clocks are passed
in: ``now`` is Unix seconds, for freshness alone; ``mono`` is monotonic seconds, for everything that lasts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from s2s.catalogue import BY_NAME, ERROR, HEALTH_CHECK, REPLY_ONLY, MessageType
from s2s.envelope import Envelope, other
from s2s.errors import Forbidden, LineFull, NotReady, Replay, TsSkew, UnsupportedType
from s2s.replay import ReplayCache
from s2s.signing import Key, Role


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


@dataclass(frozen=True)
class Timing:
    """Every wait of a link, in seconds (protocol, "Timers and bounds")."""

    proof: float = 5.0
    frame: float = 10.0
    idle: float = 10.0
    check: float = 3.0
    misses: int = 3
    call: float = 3.0
    respond: float = 10.0
    flush: float = 2.0
    fresh: float = 300.0


@dataclass(frozen=True)
class Bounds:
    """Every bound of a link, in frames and bytes (protocol, "Timers and bounds")."""

    frame_size: int = 65536
    window_frames: int = 1024
    window_bytes: int = 4 << 20
    line_calls: int = 8192
    line_bytes: int = 16 << 20
    held_frames: int = 1024
    held_bytes: int = 8 << 20
    write_bytes: int = 16 << 20
    skews_in_a_row: int = 3
    unsigned_errors: int = 2


#: What a peer takes that has not said.
UNANNOUNCED_FRAME_SIZE: Final = 65536


@dataclass(eq=False)
class Call:
    """A request of ours on its way.

    :param body: the payload's canonical bytes.
    :param size: the frame's largest size, in bytes.
    :param deadline: monotonic seconds.
    :param waiter: whatever the shell wants back with the outcome.
    """

    message: MessageType
    body: bytes
    size: int
    deadline: float
    waiter: Any
    id: str | None = None
    over: bool = False


@dataclass
class Counters:
    """What happened on a link, or on all of them."""

    frames_in: int = 0
    frames_out: int = 0
    orphan_replies: int = 0
    unsigned_errors: int = 0
    errors_out: dict[str, int] = field(default_factory=dict)
    reading_paused: int = 0
    cut_for_write_buffer: int = 0


class Session:
    """One side of one link.

    :param role: ours.
    :param replay: the process's cache.
    :param mono: monotonic seconds at the connect.
    """

    def __init__(self, role: Role, replay: ReplayCache, timing: Timing, bounds: Bounds, mono: float) -> None:
        self.role = role
        self.timing = timing
        self.bounds = bounds
        self.state = State.CHALLENGING
        #: ``key_id`` that the peer signed with last.
        self.peer_key_id: str | None = None
        self.peer_frame_size = UNANNOUNCED_FRAME_SIZE
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
        self._pending: dict[str, Call] = {}
        self._line: deque[Call] = deque()
        self._line_bytes = 0
        self._window_frames = 0
        self._window_bytes = 0
        self._next_deadline = math.inf
        self._serial = 0
        self._held: dict[int, tuple[float, int, Any]] = {}
        self._held_bytes = 0

    # --- state ----------------------------------------------------------------------------------------------------

    def move(self, event: Event) -> bool:
        """Follow one transition; ``False`` where there is none, and nothing changes."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            return False
        self.state = state
        return True

    @property
    def is_open(self) -> bool:
        """Whether frames are still read and written."""
        return self.state in (State.CHALLENGING, State.PROVEN)

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
        for name, said, wanted in (("src", envelope.src, other(self.role)), ("dst", envelope.dst, self.role)):
            if said != wanted:
                raise Forbidden(f"on this link {name} must be {wanted}", path=f"/{name}")
        if not key.may_sign_for(envelope.src):
            raise Forbidden("the key may not sign for this src", path="/auth/key_id")

    def admit(self, envelope: Envelope, key: Key, served: Collection[str], now: float, mono: float) -> MessageType:
        """Check a request up to its payload, in the protocol's order: ts, replay, type and way, proof.

        :param served: the types that this process answers.
        :raises WireError: the first check that fails.
        """
        self._check_fresh(envelope.ts, now)
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

    def _check_fresh(self, ts: int, now: float) -> None:
        window = self.timing.fresh
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
            max_skew_s=int(window),
        )
        # The rule of this one code depends on the link's past.
        refusal.closes = self._skews >= self.bounds.skews_in_a_row
        raise refusal

    def unsigned_error(self) -> bool:
        """An ``s2s.error`` without ``auth`` has come: whether it is one too many."""
        self._unsigned += 1
        return self._unsigned >= self.bounds.unsigned_errors

    # --- requests that we hold --------------------------------------------------------------------------------------

    def hold(self, item: Any, size: int, mono: float) -> int:
        """A request waits for our answer.

        :param item: whatever the shell wants back when the answer is late.
        :returns: a ticket for :meth:`release`.
        """
        self._serial += 1
        self._held[self._serial] = (mono + self.timing.respond, size, item)
        self._held_bytes += size
        return self._serial

    def release(self, ticket: int) -> bool:
        """A request is to be answered: ``False`` if it was answered before."""
        held = self._held.pop(ticket, None)
        if held is None:
            return False
        self._held_bytes -= held[1]
        return True

    def unanswered(self, mono: float) -> list[tuple[int, Any]]:
        """Give the tickets and items that have waited for too long."""
        late = []
        # All wait equally long, so that the first come is the first due.
        for ticket, (deadline, _, item) in self._held.items():
            if deadline > mono:
                break
            late.append((ticket, item))
        return late

    @property
    def holds_too_much(self) -> bool:
        """Whether no more is to be read until something is answered."""
        return len(self._held) >= self.bounds.held_frames or self._held_bytes >= self.bounds.held_bytes

    def paused(self, mono: float, is_paused: bool) -> None:
        """Reading stops or goes on; while it stops, silence and frame time are not counted."""
        self._paused = is_paused
        if not is_paused:
            self._quiet_since = mono
            self._frame_since = None if self._frame_since is None else mono

    # --- requests of ours -------------------------------------------------------------------------------------------

    @property
    def max_frame(self) -> int:
        """The longest frame that may be sent, in bytes."""
        return min(self.bounds.frame_size, self.peer_frame_size)

    def offer(self, call: Call) -> bool:
        """Take a new call: ``True`` if it may be sent now, ``False`` if it stands in line.

        :raises LineFull: the line is as long as it may get.
        """
        if self._has_room(call) and not (self._line and call.message.windowed):
            return True
        if len(self._line) >= self.bounds.line_calls or self._line_bytes + call.size > self.bounds.line_bytes:
            raise LineFull(f"{len(self._line)} calls wait for the link's window already: send less at a time")
        self._line.append(call)
        self._line_bytes += call.size
        self._watch(call)
        return False

    def _has_room(self, call: Call) -> bool:
        return not call.message.windowed or (
            self._window_frames < self.bounds.window_frames
            # One frame always fits.
            and (self._window_bytes + call.size <= self.bounds.window_bytes or self._window_frames == 0)
        )

    def next_in_line(self) -> Call | None:
        """Take the first call of the line if the window has room for it."""
        while self._line:
            call = self._line[0]
            if not call.over and not self._has_room(call):
                return None
            self._leave_line()
            if not call.over:
                return call
        return None

    def _leave_line(self) -> None:
        self._line_bytes -= self._line.popleft().size

    def sent(self, call: Call, message_id: str) -> None:
        """The call's frame was written under this ``id``."""
        call.id = message_id
        self._pending[message_id] = call
        if call.message.windowed:
            self._window_frames += 1
            self._window_bytes += call.size
        self._watch(call)

    def _watch(self, call: Call) -> None:
        self._next_deadline = min(self._next_deadline, call.deadline)

    def settle(self, ack_of: str | None) -> Call | None:
        """Find the call that a reply answers, and end it; ``None`` for a reply that nobody awaits."""
        call = self._pending.pop(ack_of, None) if ack_of is not None else None
        if call is not None:
            self._end(call)
        return call

    def _end(self, call: Call) -> None:
        call.over = True
        if call.message.windowed and call.id is not None:
            self._window_frames -= 1
            self._window_bytes -= call.size

    def expire(self, mono: float) -> list[Call]:
        """End and give every call whose deadline has passed."""
        if mono < self._next_deadline:
            return []
        # The earliest deadline known may be that of a call long answered: looking is cheaper than keeping a heap.
        calls = self._outstanding()
        late = [call for call in calls if call.deadline <= mono]
        for call in late:
            if call.id is not None:
                del self._pending[call.id]
            self._end(call)
        if late and self._line:
            self._line = deque(call for call in self._line if not call.over)
            self._line_bytes = sum(call.size for call in self._line)
        self._next_deadline = min((call.deadline for call in calls if not call.over), default=math.inf)
        return late

    def _outstanding(self) -> list[Call]:
        return [*self._pending.values(), *(call for call in self._line if not call.over)]

    def fail_all(self) -> list[Call]:
        """End and give every call, sent or in line: the link is gone."""
        calls = self._outstanding()
        for call in calls:
            self._end(call)
        self._pending.clear()
        self._line.clear()
        self._line_bytes = 0
        self._next_deadline = math.inf
        return calls

    @property
    def in_flight(self) -> int:
        """Requests in the window."""
        return self._window_frames

    @property
    def in_line(self) -> int:
        """Calls that wait for the window."""
        return len(self._line)

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

    def overdue(self, mono: float) -> str | None:
        """Say why the link must be closed now, if it must."""
        if self.state is State.CHALLENGING and mono >= self._opened + self.timing.proof:
            return "our health check was not answered" if self.has_been_heard else "no valid frame came"
        if self._frame_since is not None and not self._paused and mono >= self._frame_since + self.timing.frame:
            return "a frame took too long to come whole"
        return None

    def wants_check(self, mono: float) -> bool:
        """Whether the peer was silent for so long that it must be asked; asking is the caller's next act."""
        if self.state is not State.PROVEN or self._paused or mono < self._quiet_since + self.timing.idle:
            return False
        # The next silence counts from the check, whose own deadline watches over the answer.
        self._quiet_since = mono
        self.is_checking = True
        return True

    def next_timer(self) -> float:
        """When one of the timed methods may have something to say, in monotonic seconds."""
        times = [self._next_deadline]
        if self.state is State.CHALLENGING:
            times.append(self._opened + self.timing.proof)
        if not self._paused:
            if self.state is State.PROVEN:
                times.append(self._quiet_since + self.timing.idle)
            if self._frame_since is not None:
                times.append(self._frame_since + self.timing.frame)
        if self._held:
            times.append(next(iter(self._held.values()))[0])
        return min(times)


def is_reply(members: dict[str, Any]) -> bool:
    """Whether a parsed frame answers, or claims to: such a one is never answered."""
    said = members.get("type")
    return "ack_of" in members or (type(said) is str and said in REPLY_ONLY)


def is_unsigned_error(members: dict[str, Any]) -> bool:
    """Whether a parsed frame is an ``s2s.error`` without ``auth``: it answers no request and is never answered."""
    return members.get("type") == ERROR and "auth" not in members


#: A signed refusal with this code answers a challenge too: a peer that does not know the type holds a key all the same.
ALSO_PROVES: Final = UnsupportedType.code
CHALLENGE: Final = BY_NAME[HEALTH_CHECK]
