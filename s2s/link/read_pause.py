"""Pausing and resuming the reading of one link (docs/protocol.rst, "Windows")."""

from __future__ import annotations

from typing import Protocol

from s2s.protocol.session import Session
from s2s.runtime.clock import Clock


class Pausable(Protocol):
    """The part of Twisted's ``_PauseableMixin`` that this module uses."""

    paused: bool

    def pauseProducing(self) -> None:
        """Stop reading."""

    def resumeProducing(self) -> None:
        """Process the buffered bytes, then read again."""


class ReadPause:
    """Pauses a link's reading for a set of reasons; reading resumes when no reason is left."""

    def __init__(self, link: Pausable, session: Session, clock: Clock) -> None:
        self._link = link
        self._session = session
        self._clock = clock
        self._reasons: set[str] = set()

    @property
    def is_stopped(self) -> bool:
        """Whether at least one reason pauses reading."""
        return bool(self._reasons)

    def pause(self, reason: str) -> None:
        """Pause reading for this reason."""
        if not self._reasons and not self._link.paused:
            self._link.pauseProducing()
            self._session.paused(self._clock.mono(), True)
        self._reasons.add(reason)

    def resume(self, reason: str) -> None:
        """Remove a reason, and resume reading if it was the last one."""
        if reason in self._reasons:
            self._reasons.remove(reason)
            if not self._reasons:
                # Resume in the next reactor iteration: inside stringReceived, the frames of this chunk would be
                # delivered twice.
                self._clock.scheduler.callLater(0, self._read_again)

    def _read_again(self) -> None:
        if not self._reasons and self._link.paused and self._session.is_open:
            self._session.paused(self._clock.mono(), False)
            self._link.resumeProducing()
