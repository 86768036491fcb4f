"""``admin.player.update_all_ships.v1``: set one property of every ship, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from s2s import Access, BadPayload, Cursor, OrderHandler, OrderRun, Outcome, Unfinished
from s2s.world import tables

#: The largest number of ships that one transaction changes: another session waits for a ship no longer than that takes.
BATCH_ROWS: Final = 20_000


class UpdateAllShips(OrderHandler):
    """Sets a property of every ship that existed when the order began.

    :param batch_rows: see :data:`BATCH_ROWS`.
    """

    rpc: ClassVar[str] = "admin.player.update_all_ships.v1"
    command: ClassVar[str] = "update-all-ships"
    access: ClassVar[Access] = "admin"
    schema: ClassVar[Mapping[str, Any]] = {
        "description": "Sets one property of every ship.",
        "type": "object",
        "properties": {
            "update_field": {"description": "Which property.", "enum": list(tables.SHIP_FIELDS)},
            "new_value": {
                "description": "The new value for every ship.",
                "type": "integer",
                "minimum": -tables.MAX_ID,
                "maximum": tables.MAX_ID,
            },
            "reason": {
                "description": "Why, for the log and the audit.",
                "type": "string",
                "minLength": 1,
                "maxLength": 200,
            },
        },
        "required": ["update_field", "new_value", "reason"],
        "additionalProperties": False,
    }

    def __init__(self, batch_rows: int = BATCH_ROWS) -> None:
        self._batch_rows = batch_rows

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Change the next batch; after the last one, return the number of ships changed."""
        field, value = order.params["update_field"], order.params["new_value"]
        most = tables.SHIP_FIELDS[field]
        if not 0 <= value <= most:
            raise BadPayload(f"{field} must be from 0 to {most}", path="/payload/new_value")
        state = order.state
        if not state:
            total, last = tables.count_ships(txn)
            state = {"after": 0, "last": last, "done": 0, "total": total}
        done, end = state["done"], tables.end_of_batch(txn, state["after"], state["last"], self._batch_rows)
        if end is not None:
            done += tables.update_ships(txn, field, value, state["after"], end)
            if end < state["last"]:
                return Unfinished({**state, "after": end, "done": done})
        return {"update_field": field, "new_value": value, "ships": done}
