"""``world.set_sector_status.v1``: change the status of a sector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from s2s import Cursor, NotFound, OrderHandler, OrderRun, Outcome
from s2s.world import tables


class SetSectorStatus(OrderHandler):
    """Sets the status of a sector to ``fedspace``, ``neutral`` or ``port_closed``."""

    rpc: ClassVar[str] = "world.set_sector_status.v1"
    command: ClassVar[str] = "set-sector-status"
    schema: ClassVar[Mapping[str, Any]] = {
        "description": "Changes the rules of one sector.",
        "type": "object",
        "properties": {
            "sector_id": {"description": "Which sector.", "type": "integer", "minimum": 1, "maximum": tables.MAX_ID},
            "status": {"description": "The new rules.", "enum": list(tables.STATUSES)},
        },
        "required": ["sector_id", "status"],
        "additionalProperties": False,
    }

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Set the status, and return the new and the previous one."""
        sector_id, status = order.params["sector_id"], order.params["status"]
        was = tables.set_sector_status(txn, sector_id, status)
        if was is None:
            raise NotFound(f"there is no sector {sector_id}", path="/payload/sector_id")
        return {"sector_id": sector_id, "status": status, "was": was}
