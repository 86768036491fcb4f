"""The history of a campaign: the operations of its clients and their outcomes, in the manner of Jepsen.

An operation is invoked, and ends as ``ok``, as ``fail`` (it certainly has no effect) or as ``unknown`` (it may have an
effect). An operation that never ended is unknown too.
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
    :param client: the client's name.
    :param number: the number of the operation, unique in the history.
    :param op: the operation's name, such as ``push``.
    :param what: the operation's arguments, or its outcome.
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

    :param asked: its arguments.
    :param ended: how it ended; ``unknown`` also if the history has no end of it.
    :param came: its outcome.
    :param since: when it began, in seconds since the history began.
    :param until: when it ended; infinity if the history has no end of it.
    """

    client: str
    op: str
    asked: Mapping[str, Any]
    ended: Kind
    came: Mapping[str, Any]
    since: float
    until: float


class History:
    """Records events from any thread, and writes each to a file.

    :param path: the path of the file, in JSON lines; ``None``: there is no file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._file = None if path is None else path.open("w", buffering=1 << 16)
        self._count = 0
        self.events: list[Event] = []

    def now(self) -> float:
        """Return the seconds since the history began."""
        return time.monotonic() - self._began

    def invoke(self, client: str, op: str, **what: Any) -> int:
        """Record the beginning of an operation.

        :returns: its number.
        """
        with self._lock:
            self._count += 1
            self._add(Event(self.now(), client, self._count, op, "invoke", what))
            return self._count

    def end(self, number: int, client: str, op: str, kind: Kind, **what: Any) -> None:
        """Record the end of an operation."""
        with self._lock:
            self._add(Event(self.now(), client, number, op, kind, what))

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is not None:
            self._file.close()

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if self._file is not None:
            self._file.write(json.dumps(asdict(event)) + "\n")


def operations(events: list[Event]) -> list[Operation]:
    """Match the beginnings with the ends, and return the operations in the order of their beginnings."""
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
    """Read a history from its file."""
    return [Event(**json.loads(line)) for line in path.read_text().splitlines()]
