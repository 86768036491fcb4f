"""A bound on the log lines about each peer that holds a valid key, over all of the peer's links.

A peer is a key and a network here. The name that a peer announces is not part of its identity, because a peer may
announce another name on each link.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from twisted.logger import Logger

from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, TOLD, LineQuota

#: Maximum number of peers that are counted separately. A new peer replaces the one whose last event is the oldest.
MAX_PEERS: Final = 1000
#: Maximum lines about all peers in one minute; further events are counted together.
MOST_OF_ALL: Final = 100
#: The kinds of events that a peer can cause. ``_MOST`` holds the maximum lines of each kind for one peer in one minute.
FRAMES: Final = "refused more frames"
ANSWERS: Final = "gave more answers that are not valid"
ENDS: Final = "ended more links"
_MOST: Final = {FRAMES: MOST_TOLD, ANSWERS: TOLD, ENDS: MOST_TOLD}


class PeerLines:
    """A quota for each peer of one process: a few lines a minute, and the first line of each cause."""

    log = Logger()

    def __init__(self, clock: Clock) -> None:
        self._scheduler = clock.scheduler
        #: The quotas by peer and kind of event, the most recently used last.
        self._quotas: dict[tuple[str, str], LineQuota] = {}
        self._all = LineQuota(self._scheduler, self._tell_all, MOST_OF_ALL)

    def may_tell(self, peer: str, kind: str, cause: str) -> bool:
        """Return whether the log may have a line about an event of a peer; otherwise count the event.

        :param peer: the peer's key and network, as in the log line.
        :param kind: the kind of event: :data:`FRAMES`, :data:`ANSWERS` or :data:`ENDS`.
        :param cause: the cause; events are counted by its text up to the first colon.
        """
        quota = self._quotas.pop((peer, kind), None) or LineQuota(
            self._scheduler, lambda untold: self._tell(peer, kind, untold), _MOST[kind], is_first_told=True
        )
        if len(self._quotas) >= MAX_PEERS * len(_MOST):
            self._quotas.pop(next(iter(self._quotas))).stop()
        self._quotas[peer, kind] = quota
        return quota.may_tell(cause.partition(":")[0]) and self._all.may_tell(kind)

    def stop(self) -> None:
        """Log the present counts."""
        for quota in (*self._quotas.values(), self._all):
            quota.stop()

    def _tell(self, peer: str, kind: str, untold: Mapping[str, int]) -> None:
        if self._all.may_tell(kind, sum(untold.values())):
            told = ", ".join(f"{count} {cause}" for cause, count in untold.items())
            self.log.warn("{peer}: {kind}: {told}", peer=peer, kind=kind, told=told)

    def _tell_all(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} times {kind}" for kind, count in untold.items())
        self.log.warn("further events of peers that hold a key, of many peers: {told}", told=told)
