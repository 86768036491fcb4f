"""The lines of the log about peers that hold a valid key: bounded for each peer, on however many links it comes.

A peer is a key and a network here. What it says of itself is no part of that: it may say something else on each link.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from twisted.logger import Logger

from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, TOLD, LineQuota

#: Peers that are counted apart. The one of which nothing was heard for longest makes room for another.
MAX_PEERS: Final = 1000
#: Lines about all peers in one minute; further ones are counted together.
MOST_OF_ALL: Final = 100
#: What a peer can cause, each with the lines that one peer has for it in one minute.
FRAMES: Final = "refused more frames"
ANSWERS: Final = "gave more answers that are not valid"
ENDS: Final = "ended more links"
_MOST: Final = {FRAMES: MOST_TOLD, ANSWERS: TOLD, ENDS: MOST_TOLD}


class PeerLines:
    """Allows each peer of one process a few lines a minute, and the first line of each cause."""

    log = Logger()

    def __init__(self, clock: Clock) -> None:
        self._scheduler = clock.scheduler
        #: By peer and what it causes; the one that was asked for last stands last.
        self._quotas: dict[tuple[str, str], LineQuota] = {}
        self._all = LineQuota(self._scheduler, self._tell_all, MOST_OF_ALL)

    def may_tell(self, peer: str, what: str, cause: str) -> bool:
        """Ask for a line of the log about a peer.

        :param peer: its key and network, as a line calls them.
        :param what: :data:`FRAMES`, :data:`ANSWERS` or :data:`ENDS`.
        :param cause: what is counted, up to its first colon.
        """
        quota = self._quotas.pop((peer, what), None) or LineQuota(
            self._scheduler, lambda untold: self._tell(peer, what, untold), _MOST[what], is_first_told=True
        )
        if len(self._quotas) >= MAX_PEERS * len(_MOST):
            self._quotas.pop(next(iter(self._quotas))).stop()
        self._quotas[peer, what] = quota
        return quota.may_tell(cause.partition(":")[0]) and self._all.may_tell(what)

    def stop(self) -> None:
        """Tell what is counted now."""
        for quota in (*self._quotas.values(), self._all):
            quota.stop()

    def _tell(self, peer: str, what: str, untold: Mapping[str, int]) -> None:
        if self._all.may_tell(what, sum(untold.values())):
            told = ", ".join(f"{count} {cause}" for cause, count in untold.items())
            self.log.warn("{peer}: {what}: {told}", peer=peer, what=what, told=told)

    def _tell_all(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} times {what}" for what, count in untold.items())
        self.log.warn("many peers that hold a key did what had no line: {told}", told=told)
