"""The admin RPCs (docs/protocol.rst, "Orders")."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred

from s2s.errors import DatabaseUnavailable, DbUnavailable
from s2s.protocol.received import Request
from s2s.roles.engine.order_runner import OrderRunner


class RunOrder:
    """Has an order run, and answers with the status and result in its row."""

    def __init__(self, runner: OrderRunner) -> None:
        self._runner = runner

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer when the order is over, and after two seconds at the latest."""
        return Deferred.fromCoroutine(self._order(request))

    async def _order(self, request: Request) -> dict[str, Any]:
        # Use the payload as it was sent, since it is compared with the row.
        payload = request.envelope.payload
        params = {member: value for member, value in payload.items() if member != "order_id"}
        order_id = payload["order_id"]
        try:
            order = await self._runner.take(order_id, request.message.name, params, f"key:{request.key_id}")
        except DatabaseUnavailable:
            raise DbUnavailable(retry_after_ms=1000) from None
        is_well = order.status not in ("refused", "failed")
        return {"ok": is_well, "order_id": order_id, "status": order.status, "result": order.result}
