"""``s2s.health.check`` (docs/protocol.rst, "Two challenges")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from s2s import __version__
from s2s.protocol.identity import Identity
from s2s.protocol.received import Request
from s2s.runtime.clock import Clock


class Health:
    """Answers with the identity and the condition of this process.

    :param frame_size: the largest frame that this process accepts, in bytes.
    :param condition: returns the members that change: ``state``, ``degraded``, ``config_version``, ``outbox_depth``,
        ``stuck``. It must not block.
    """

    def __init__(
        self, identity: Identity, frame_size: int, clock: Clock, condition: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._fixed = {
            "role": identity.role,
            "name": identity.name,
            "boot_id": identity.boot_id,
            "version": __version__,
            "frame_size_limit": frame_size,
        }
        self._clock = clock
        self._started = clock.mono()
        self._condition = condition

    def __call__(self, request: Request) -> Mapping[str, Any]:
        """Answer at once."""
        return {**self._fixed, "uptime_s": int(self._clock.mono() - self._started), **self._condition()}
