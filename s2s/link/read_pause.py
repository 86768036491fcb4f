"""When one link reads, and when it does not (docs/protocol.rst, "Windows")."""

from __future__ import annotations

from typing import Protocol

from s2s.protocol.session import Session
from s2s.runtime.clock import Clock


class Pausable(Protocol):
    """What of ``_PauseableMixin`` is used here."""

    paused: bool

    def pauseProducing(self) -> None:
        """Read no more."""

    def resumeProducing(self) -> None:
        """Read, and first what is buffered."""


class ReadPause:
    """Pauses a link's reading for a set of reasons: it goes on when none is left."""

    def __init__(self, link: Pausable, session: Session, clock: Clock) -> None:
        self._link = link
        self._session = session
        self._clock = clock
        self._reasons: set[str] = set()

    @property
    def is_stopped(self) -> bool:
        """Whether there is a reason not to read."""
        return bool(self._reasons)

    def pause(self, reason: str) -> None:
        """Read no more, for this reason."""
        if not self._reasons and not self._link.paused:
            self._link.pauseProducing()
            self._session.paused(self._clock.mono(), True)
        self._reasons.add(reason)

    def resume(self, reason: str) -> None:
        """A reason is over."""
        if reason in self._reasons:
            self._reasons.remove(reason)
            if not self._reasons:
                # Not now: inside stringReceived the frames of this chunk would be delivered twice.
                self._clock.scheduler.callLater(0, self._read_again)

    def _read_again(self) -> None:
        if not self._reasons and self._link.paused and self._session.is_open:
            self._session.paused(self._clock.mono(), False)
            self._link.resumeProducing()
