"""``s2s.engine.shutdown`` (docs/protocol.rst, "s2s.engine.shutdown")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from s2s.link.dispatcher import Request
from s2s.roles.engine.state import EngineState


class Shutdown:
    """Lets the process drain, and answers at once.

    :param end: begins the end: given why, and the grace in seconds, it says when the grace is over, in Unix seconds.
    :param note: has the audit know of the request and its answer, and does not wait for it.
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
        """Answer with the deadline; of several shutdowns the earliest one holds."""
        self._condition.is_draining = True
        deadline = self._end(f"told to: {request.payload['reason']!r}", request.payload["grace_ms"] / 1000)
        answer = {"ok": True, "state": self._condition.state, "deadline_ms": int(deadline * 1000)}
        self._note(request, answer)
        return answer
