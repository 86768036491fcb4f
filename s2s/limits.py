"""Every wait and every bound of a link, and the counters of what was met (docs/protocol.rst, "Timers and bounds")."""

from __future__ import annotations

from dataclasses import dataclass, field


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
