"""Every timeout and every bound of a link, and their counters (docs/protocol.rst, "Timers and bounds").

All links of a process share one instance of each class. A changed setting applies to every link from its next frame or
timer on (:meth:`s2s.link.factory.LinkFactory.configure`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from s2s.protocol.settings import number


@dataclass
class Timing:
    """Every timeout of a link, in seconds, and ``misses``, a count (protocol, "Timers and bounds")."""

    proof: float = 5.0
    frame: float = 10.0
    idle: float = number("link.idle_s")
    check: float = number("link.check_s")
    misses: int = number("link.misses")
    call: float = number("link.call_s")
    respond: float = 10.0
    flush: float = 2.0

    @property
    def soonest(self) -> float:
        """The shortest of the timeouts that incoming data may start."""
        return min(self.frame, self.idle, self.respond)


@dataclass
class Bounds:
    """Every bound of a link, in frames, calls or bytes (protocol, "Timers and bounds")."""

    frame_size: int = 65536
    window_frames: int = number("link.window")
    window_bytes: int = number("link.window_kib") << 10
    line_calls: int = 8192
    line_bytes: int = 16 << 20
    held_frames: int = 1024
    held_bytes: int = 8 << 20
    write_bytes: int = 16 << 20
    #: Maximum bytes that wait to be written on all links of a process. One link may use at most the remainder.
    all_write_bytes: int = 256 << 20
    skews_in_a_row: int = 3
    unsigned_errors: int = 2


#: Every bound and every timeout of a process that can be reached, with the description of its counter.
MET: Final = {
    "window": "calls that had to wait in line for the link's window",
    "line": "calls refused because the line was full",
    "call": "calls without an answer in time",
    "held": "times that a link stopped reading until something was answered",
    "respond": "requests that were not answered in time",
    "write_buffer": "links cut because the peer does not read",
    "flush": "closing links cut because the peer does not read",
    "frame_size": "frames refused by their length",
    "frame": "links closed because a frame did not come whole in time",
    "proof": "links closed because our health check was not answered in time",
    "silence": "links cut because the peer answered no health check",
    "ts_skew": "links closed after ts_skew in a row",
    "unsigned_errors": "links closed after unsigned errors",
    "replay_cache": "requests refused because the replay cache has no room for more of their key",
    "links": "links closed because there are too many",
    "silent_links": "silent connections closed to make room for newer ones",
    "strangers": "times that a link without a valid frame had to wait until its bytes were taken",
    "handshakes": "TLS connections that had to wait until their handshake began",
    "handshakes_closed": "TLS connections closed unanswered because too many waited for their handshake",
    "inbox": "pushes refused because too many wait to be committed",
    "audit": "entries of the audit that were not written: too many at once, or no database",
    "http_connections": "HTTP connections refused or closed to make room, because there are too many",
    "http_arrive": "HTTP connections closed because a request did not come whole in time",
    "http_take": "HTTP connections closed because an answer was not read in time",
    "http_answers": "HTTP connections closed because too many bytes of answers were not read",
    "http_bodies": "HTTP connections closed because too many bytes of bodies were arriving",
    "http_body": "HTTP requests refused by the length of their body",
    "http_waiting": "HTTP requests refused because too many wait for an order or an engine",
    "http_strangers": "times that an HTTP request without a valid token had to wait until it was read",
    "http_line": "HTTP requests refused because too many stand in line for the database",
    "http_step": "HTTP requests refused because the database did not answer in time",
    "sign_ins": "HTTP requests refused because too many sign-ins failed from their address",
    "database": "transactions refused because too many wait for a connection",
    "handler": "handlers that did not return after their deadline",
    "database_answer": "statements given up because the database did not answer in time",
}


@dataclass
class Counters:
    """The counters of a link, or of all links of a process.

    :ivar waiting_bytes: bytes that wait to be written now, on all links.
    :ivar met: how often each bound of :data:`MET` was reached.
    """

    frames_in: int = 0
    frames_out: int = 0
    waiting_bytes: int = 0
    orphan_replies: int = 0
    unsigned_errors: int = 0
    errors_out: Counter[str] = field(default_factory=Counter)
    errors_in: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)

    def meet(self, bound: str) -> None:
        """Count that a bound was reached.

        :param bound: one of :data:`MET`.
        """
        assert bound in MET, bound
        self.met[bound] += 1
