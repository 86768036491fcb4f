"""``s2s.engine.shutdown`` (docs/protocol.rst, "s2s.engine.shutdown")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from s2s.protocol.received import Request
from s2s.roles.engine.state import EngineState


class Shutdown:
    """Starts the shutdown of the process, and answers at once.

    :param end: starts the shutdown, given the reason and the grace in seconds; returns the end of the grace in Unix
        seconds.
    :param note: records the request and its reply in the audit, fire-and-forget.
    """

    def __init__(
        self,
        end: Callable[[str, float], float],
        condition: EngineState,
        note: Callable[[Request, Mapping[str, Any]], object],
    ) -> None:
        self._end = end
        self._condition = condition
        self._note = note

    def __call__(self, request: Request) -> Mapping[str, Any]:
        """Answer with the deadline; of several shutdowns the earliest deadline holds."""
        self._condition.is_draining = True
        deadline = self._end(f"told to: {request.payload['reason']!r}", request.payload["grace_ms"] / 1000)
        answer = {"ok": True, "state": self._condition.state, "deadline_ms": int(deadline * 1000)}
        self._note(request, answer)
        return answer
