"""``s2s.command.push`` (docs/protocol.rst, "Commands")."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from s2s.link.dispatcher import Request
from s2s.roles.server.inbox import Inbox


class Push:
    """Passes the command to the inbox, which answers after the COMMIT."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer when the command is durable."""
        return self._inbox.push(request.payload)
