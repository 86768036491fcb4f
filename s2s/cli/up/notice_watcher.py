"""The database checks of ``s2s up``: new notices, and the result of its own broadcast. All of them block."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Protocol

from ulid_transform import ulid_now

from s2s.errors import DatabaseUnavailable
from s2s.store import pool
from s2s.store.tables import broadcasts, notices

#: Seconds between two reads of the notices, the number of new notices that are shown, and the most characters of each.
_BOARD_S = 1.0
_SHOWN = 3
_NOTICE_CHARACTERS = 200
#: Seconds within which the link must be up if ``s2s up`` runs for a limited time.
_LINKS_S = 60.0


class Say(Protocol):
    """Prints a line for operators: its source, its text, and the time of day if it is not now."""

    def __call__(self, source: str, text: str, at: str | None = None, /) -> None: ...


class NoticeWatcher:
    """Shows new notices."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._newest: int | None = None
        self._due = 0.0

    def poll(self, say: Say) -> None:
        """Read the notices at intervals, and show the newest of the new ones."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _BOARD_S
        with suppress(DatabaseUnavailable), pool.blocking(self._url, "s2s up") as txn:
            found = notices.LISTED.read(txn, _SHOWN, None)
            fresh = [notice for notice in found if self._newest is not None and notice.notice_id > self._newest]
            self._newest = max((notice.notice_id for notice in found), default=0)
            for notice in reversed(fresh):
                # Quote the text, because a terminal would obey control characters in it.
                say("notice", repr(notice.message)[:_NOTICE_CHARACTERS])


class SmokeBroadcast:
    """A broadcast that is sent when the link is up, and the wait for its notice."""

    def __init__(self, url: str, for_seconds: float) -> None:
        self.arrived = False
        self._url = url
        self._for_seconds = for_seconds
        self._message = f"s2s up was here ({ulid_now()})"
        self._sent = False
        self._deadline = time.monotonic() + _LINKS_S

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._deadline

    @property
    def verdict(self) -> str:
        """The result of the broadcast, for operators."""
        if self.arrived:
            return "the broadcast came the whole way: it is a notice"
        if self._sent:
            return f"the broadcast was not a notice after {self._for_seconds:g} s"
        return "no link came up, so no broadcast was sent"

    def poll(self, say: Say) -> None:
        """Send the broadcast once, then look for its notice."""
        with suppress(DatabaseUnavailable), pool.blocking(self._url, "s2s up") as txn:
            if not self._sent:
                broadcasts.add(txn, self._message)
                say("up", f"sent a broadcast: {self._message}")
                self._sent = True
                self._deadline = time.monotonic() + self._for_seconds
            elif not self.arrived:
                self.arrived = notices.exists(txn, self._message)
