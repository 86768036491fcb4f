"""Our requests on one link: in flight or queued, and their deadlines (docs/protocol.rst, "Windows")."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import msgspec

from s2s.errors import LineFull
from s2s.protocol.catalogue import MessageType
from s2s.protocol.limits import Bounds


class Call(msgspec.Struct, eq=False):
    """One of our requests, queued or sent.

    :param body: the payload's canonical bytes, until they are sent.
    :param size: the largest possible size of the frame, in bytes.
    :param deadline: monotonic seconds.
    :param waiter: an object of the caller, returned with the call; the link stores a Deferred in it.
    """

    message: MessageType
    body: bytes
    size: int
    deadline: float
    waiter: Any
    id: str | None = None


class Window:
    """The calls that were sent and are not answered, and the queue of calls that wait to be sent.

    :ivar next_deadline: the earliest time at which :meth:`expire` may return a call, in monotonic seconds.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._clear()

    def _clear(self) -> None:
        self._pending: dict[str, Call] = {}
        self._line: deque[Call] = deque()
        self._line_bytes = 0
        self._window_frames = 0
        self._window_bytes = 0
        self.next_deadline = math.inf

    def offer(self, call: Call) -> bool:
        """Accept a new call: return ``True`` if it may be sent now, or queue it and return ``False``.

        :raises LineFull: the queue has reached its bound.
        """
        if self._has_room(call) and not (self._line and call.message.windowed):
            return True
        if len(self._line) >= self._bounds.line_calls or self._line_bytes + call.size > self._bounds.line_bytes:
            raise LineFull(f"{len(self._line)} calls wait for the link's window already: send less at a time")
        self._line.append(call)
        self._line_bytes += call.size
        self._watch(call)
        return False

    def _has_room(self, call: Call) -> bool:
        return not call.message.windowed or (
            self._window_frames < self._bounds.window_frames
            # An empty window takes a frame of any size.
            and (self._window_bytes + call.size <= self._bounds.window_bytes or self._window_frames == 0)
        )

    def next_in_line(self) -> Call | None:
        """Remove and return the first call of the queue if the window has room for it."""
        if not self._line or not self._has_room(self._line[0]):
            return None
        call = self._line.popleft()
        self._line_bytes -= call.size
        return call

    def sent(self, call: Call, message_id: str) -> bytes:
        """Record that the call's frame is sent with this ``id``.

        :returns: the body, which the call no longer keeps because only sending needs it.
        """
        body, call.body = call.body, b""
        call.id = message_id
        self._pending[message_id] = call
        if call.message.windowed:
            self._window_frames += 1
            self._window_bytes += call.size
        self._watch(call)
        return body

    def _watch(self, call: Call) -> None:
        self.next_deadline = min(self.next_deadline, call.deadline)

    def settle(self, ack_of: str | None) -> Call | None:
        """Remove and return the call that a reply answers, or return ``None`` if no call awaits the reply."""
        call = self._pending.pop(ack_of, None) if ack_of is not None else None
        if call is not None and call.message.windowed:
            self._window_frames -= 1
            self._window_bytes -= call.size
        return call

    def expire(self, mono: float) -> list[Call]:
        """Remove and return every call whose deadline has passed, sent or queued."""
        if mono < self.next_deadline:
            return []
        # The earliest known deadline may belong to a call that was answered already. A scan is cheaper than a heap.
        late = [call for call in (*self._pending.values(), *self._line) if call.deadline <= mono]
        for call in late:
            self.settle(call.id)
        if late:
            self._line = deque(call for call in self._line if call.deadline > mono)
            self._line_bytes = sum(call.size for call in self._line)
        self.next_deadline = min((call.deadline for call in (*self._pending.values(), *self._line)), default=math.inf)
        return late

    def fail_all(self) -> list[Call]:
        """Remove and return every call, sent or queued, because the link has ended."""
        calls = [*self._pending.values(), *self._line]
        self._clear()
        return calls

    @property
    def in_flight(self) -> int:
        """The number of requests in the window."""
        return self._window_frames

    @property
    def in_line(self) -> int:
        """The number of queued calls."""
        return len(self._line)
