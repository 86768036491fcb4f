"""What the clients of a campaign did and were told, in the manner of Jepsen.

An operation is invoked, and ends as ``ok``, as ``fail`` (it certainly has no effect) or as ``unknown`` (it may have
one). One that never ended is unknown too.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["invoke", "ok", "fail", "unknown"]


@dataclass(frozen=True)
class Event:
    """One line of a history.

    :param at: seconds since the history began.
    :param client: who: one client has one operation under way under one number.
    :param number: of the operation.
    :param op: its name, such as ``push``.
    :param what: its arguments, or what it came to.
    """

    at: float
    client: str
    number: int
    op: str
    kind: Kind
    what: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """An operation, from its beginning to its end.

    :param ended: how; ``unknown`` also where nothing more is said of it.
    :param came: what it came to.
    :param until: when it ended; for ever where it did not.
    """

    client: str
    op: str
    asked: Mapping[str, Any]
    ended: Kind
    came: Mapping[str, Any]
    since: float
    until: float


class History:
    """Takes events of any thread, and writes each to a file as it comes.

    :param path: of the file, of JSON lines; ``None``: there is none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._file = None if path is None else path.open("w", buffering=1 << 16)
        self._count = 0
        self.events: list[Event] = []

    def now(self) -> float:
        """Give the seconds since it began."""
        return time.monotonic() - self._began

    def invoke(self, client: str, op: str, **what: Any) -> int:
        """An operation begins.

        :returns: its number.
        """
        with self._lock:
            self._count += 1
            self._add(Event(self.now(), client, self._count, op, "invoke", what))
            return self._count

    def end(self, number: int, client: str, op: str, kind: Kind, **what: Any) -> None:
        """An operation ends."""
        with self._lock:
            self._add(Event(self.now(), client, number, op, kind, what))

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if self._file is not None:
            self._file.write(json.dumps(asdict(event)) + "\n")


def operations(events: list[Event]) -> list[Operation]:
    """Put beginnings and ends together, in the order of the beginnings."""
    ends = {event.number: event for event in events if event.kind != "invoke"}
    return list(_together(events, ends))


def _together(events: list[Event], ends: Mapping[int, Event]) -> Iterator[Operation]:
    for event in events:
        if event.kind == "invoke":
            end = ends.get(event.number)
            if end is None:
                end = Event(float("inf"), event.client, event.number, event.op, "unknown")
            yield Operation(event.client, event.op, event.what, end.kind, end.what, event.at, end.at)


def read(path: Path) -> list[Event]:
    """Read a history that was written."""
    return [Event(**json.loads(line)) for line in path.read_text().splitlines()]
