"""``s2s.engine.pause`` and ``s2s.engine.resume`` (docs/protocol.rst, "s2s.engine.pause, s2s.engine.resume")."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from s2s.errors import DatabaseUnavailable, DbUnavailable
from s2s.protocol.received import Request
from s2s.roles.engine.desired_state import DesiredState
from s2s.roles.engine.state import EngineState


class Pause:
    """Stores that the engine is to pause, or to run.

    :param state: ``paused`` or ``running``.
    """

    def __init__(self, wanted: DesiredState, state: str, condition: EngineState) -> None:
        self._wanted = wanted
        self._state = state
        self._condition = condition

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer when the wanted state is durable."""
        return Deferred.fromCoroutine(self._pause(request))

    async def _pause(self, request: Request) -> dict[str, Any]:
        try:
            await self._wanted.set(self._state, request.payload["reason"], f"key:{request.key_id}")
        except DatabaseUnavailable:
            raise DbUnavailable(retry_after_ms=1000) from None
        return {"ok": True, "state": self._condition.state}
