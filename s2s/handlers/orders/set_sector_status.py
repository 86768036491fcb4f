"""``world.set_sector_status.v1``: change the status of a sector."""

from __future__ import annotations

from typing import ClassVar

from s2s.errors import NotFound
from s2s.handlers.jobs import Outcome
from s2s.handlers.orders.handler import OrderHandler, OrderRun
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.tables import world


class SetSectorStatus(OrderHandler):
    """Sets the status of a sector to ``fedspace``, ``neutral`` or ``port_closed``."""

    rpc: ClassVar[str] = "world.set_sector_status.v1"

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Set the status, and return the new and the previous one."""
        sector_id, status = order.params["sector_id"], order.params["status"]
        was = world.set_sector_status(own(txn), sector_id, status)
        if was is None:
            raise NotFound(f"there is no sector {sector_id}", path="/payload/sector_id")
        return {"sector_id": sector_id, "status": status, "was": was}
