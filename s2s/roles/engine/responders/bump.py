"""``s2s.config.bump`` (docs/protocol.rst, "s2s.config.bump")."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from s2s.errors import DatabaseUnavailable, DbUnavailable, StaleVersion
from s2s.protocol.received import Request
from s2s.roles.live_config import LiveConfig


class Bump:
    """Puts the newest configuration in force and answers with its version."""

    def __init__(self, config: LiveConfig) -> None:
        self._config = config

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer when the requested version or a newer one is in force."""
        return Deferred.fromCoroutine(self._bump(request.payload["version"]))

    async def _bump(self, version: int) -> dict[str, Any]:
        if version > self._config.version:
            try:
                await self._config.read_now()
            except DatabaseUnavailable:
                raise DbUnavailable(retry_after_ms=1000) from None
        if version > self._config.version:
            raise StaleVersion(
                f"the database of this engine has version {self._config.version}: if it is another database than the"
                " server's, make the change there as well: s2s config set",
                path="/payload/version",
            )
        return {"ok": True, "version": self._config.version}
