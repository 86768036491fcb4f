"""What a client is to do, and what it counts."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

#: What a frame of ours has beside the filling of its payload, in bytes, more or less.
FRAME_BYTES = 330


@dataclass(frozen=True)
class Load:
    """How a contestant is driven.

    :param window: what each link, or each task where there are no links, has under way at once.
    :param links: connections.
    :param size: of a signed frame of ours, in bytes; everybody carries the same filling.
    :param rate: requests in a second, evenly; 0: as many as the window lets through.
    :param warm_up_s: seconds before anything is counted.
    :param seconds: for which is counted.
    :param items: what there is to do where everything is there from the beginning.
    :param is_scattered: whether the keys come in no order.
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
        """Text that makes a frame as long as it is to be."""
        return "x" * max(1, self.size - FRAME_BYTES)


@dataclass(frozen=True)
class Place:
    """Where a contestant's two sides meet.

    :param port: of 127.0.0.1, where its server listens.
    :param url: of its database, which has our tables and one key; empty where none is wanted.
    """

    port: int = 0
    url: str = ""


@dataclass
class Meter:
    """Counts what is done while it is measured.

    :ivar count: of everything, the warm-up included; whoever drives adds to it.
    :ivar took: seconds that each request took, where somebody wants to know.
    """

    count: int = 0
    took: list[float] = field(default_factory=list)
    _marks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the measured time is over."""
        return len(self._marks) == 2

    def mark(self) -> None:
        """The measured time begins, or ends."""
        self._marks.append((time.perf_counter(), self.count))
        if len(self._marks) == 1:
            self.took.clear()

    def took_all(self, count: int, seconds: float) -> None:
        """Everything was there from the beginning, and took so long."""
        self._marks = [(0.0, 0), (seconds, count)]

    def told(self) -> str:
        """Give the result, as a line of JSON: see :class:`Result`."""
        (since, before), (until, after) = self._marks
        return json.dumps(asdict(Result(after - before, until - since, percentiles(self.took))))


@dataclass(frozen=True)
class Result:
    """What came of one measurement.

    :param percentiles: of the seconds that a request took: 50, 99 and 99.9; empty where nobody measured.
    """

    count: int
    seconds: float
    percentiles: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """How many in a second."""
        return self.count / self.seconds


def percentiles(values: list[float], of: tuple[float, ...] = (50, 99, 99.9)) -> list[float]:
    """Give percentiles by the nearest rank; none of nothing."""
    ranked = sorted(values)
    return [ranked[max(0, math.ceil(len(ranked) * share / 100) - 1)] for share in of] if ranked else []


def keys(name: str, is_scattered: bool = False) -> Iterator[str]:
    """Give keys that nobody else has.

    :param is_scattered: in no order.
    """
    stamp = time.time_ns()
    count = 0
    while True:
        count += 1
        key = f"{name}-{stamp}-{count}"
        yield hashlib.sha256(key.encode()).hexdigest()[:32] if is_scattered else key


def push(key: str, filling: str) -> dict[str, Any]:
    """Give a command as a payload of ``s2s.command.push``."""
    content = {"scope": "global", "severity": "info", "message": filling}
    return {"cmd_type": "notice.publish", "idem_key": key, "payload": content}
