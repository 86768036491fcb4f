"""The load of a client, and the result that it measures."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

#: Approximate bytes of our frame without the filling of its payload.
FRAME_BYTES = 330


@dataclass(frozen=True)
class Load:
    """The load on a contestant.

    :param window: requests in flight at once on each link, or tasks at once where there are no links.
    :param links: number of connections.
    :param size: bytes of a signed frame of ours; every contestant carries the same filling.
    :param rate: requests a second, evenly spaced; 0: as many as the window permits.
    :param warm_up_s: seconds before the measurement begins.
    :param seconds: duration of the measurement.
    :param items: number of items where all exist from the beginning, or in one batch.
    :param is_scattered: whether the keys are random.
    """

    window: int = 1
    links: int = 1
    size: int = 400
    rate: int = 0
    warm_up_s: float = 1.0
    seconds: float = 3.0
    items: int = 0
    is_scattered: bool = False

    @property
    def filling(self) -> str:
        """Text that brings a frame to about ``size`` bytes."""
        return "x" * max(1, self.size - FRAME_BYTES)


@dataclass(frozen=True)
class Place:
    """Where a contestant's two sides meet.

    :param port: port of 127.0.0.1 on which its server listens.
    :param url: URL of its database; empty if it needs none.
    """

    port: int = 0
    url: str = ""


@dataclass
class Meter:
    """Counts the items done during the measurement.

    :ivar count: items done, the warm-up included; the driver increments it.
    :ivar took: seconds that each request took; empty unless the driver measures latency.
    """

    count: int = 0
    took: list[float] = field(default_factory=list)
    _marks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the measured time is over."""
        return len(self._marks) == 2

    def mark(self) -> None:
        """Begin the measured time at the first call, and end it at the second."""
        self._marks.append((time.perf_counter(), self.count))
        if len(self._marks) == 1:
            self.took.clear()

    def took_all(self, count: int, seconds: float) -> None:
        """Set the result of a contestant whose items all existed from the beginning."""
        self._marks = [(0.0, 0), (seconds, count)]

    def told(self) -> str:
        """Return the :class:`Result` as a line of JSON."""
        (since, before), (until, after) = self._marks
        return json.dumps(asdict(Result(after - before, until - since, percentiles(self.took))))


@dataclass(frozen=True)
class Result:
    """The result of one measurement.

    :param count: items done.
    :param seconds: duration.
    :param percentiles: percentiles 50, 99 and 99.9 of the seconds that a request took; empty if not measured.
    """

    count: int
    seconds: float
    percentiles: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.count / self.seconds


def percentiles(values: list[float], of: tuple[float, ...] = (50, 99, 99.9)) -> list[float]:
    """Return percentiles by the nearest rank; an empty list if there are no values."""
    ranked = sorted(values)
    return [ranked[max(0, math.ceil(len(ranked) * share / 100) - 1)] for share in of] if ranked else []


def keys(name: str, is_scattered: bool = False) -> Iterator[str]:
    """Generate unique keys.

    :param is_scattered: whether the keys are random.
    """
    stamp = time.time_ns()
    count = 0
    while True:
        count += 1
        key = f"{name}-{stamp}-{count}"
        yield hashlib.sha256(key.encode()).hexdigest()[:32] if is_scattered else key


def push(key: str, filling: str) -> dict[str, Any]:
    """Return a command as a payload of ``s2s.command.push``."""
    content = {"scope": "global", "severity": "info", "message": filling}
    return {"cmd_type": "notice.publish", "idem_key": key, "payload": content}
