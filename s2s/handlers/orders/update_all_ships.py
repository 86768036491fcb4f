"""``admin.player.update_all_ships.v1``: set one property of every ship, batch by batch."""

from __future__ import annotations

from typing import ClassVar, Final

from s2s.errors import BadPayload
from s2s.handlers.jobs import Outcome, Unfinished
from s2s.handlers.orders.handler import OrderHandler, OrderRun
from s2s.store.access import Access
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.tables import world

#: The largest number of ships that one transaction changes: another session waits for a ship no longer than that takes.
BATCH_ROWS: Final = 20_000


class UpdateAllShips(OrderHandler):
    """Sets a property of every ship that existed when the order began.

    :param batch_rows: see :data:`BATCH_ROWS`.
    """

    rpc: ClassVar[str] = "admin.player.update_all_ships.v1"
    access: ClassVar[Access] = "admin"

    def __init__(self, batch_rows: int = BATCH_ROWS) -> None:
        self._batch_rows = batch_rows

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Change the next batch; after the last one, return the number of ships changed."""
        txn = own(txn)
        field, value = order.params["update_field"], order.params["new_value"]
        most = world.SHIP_FIELDS[field]
        if not 0 <= value <= most:
            raise BadPayload(f"{field} must be from 0 to {most}", path="/payload/new_value")
        state = order.state
        if not state:
            total, last = world.count_ships(txn)
            state = {"after": 0, "last": last, "done": 0, "total": total}
        done, end = state["done"], world.end_of_batch(txn, state["after"], state["last"], self._batch_rows)
        if end is not None:
            done += world.update_ships(txn, field, value, state["after"], end)
            if end < state["last"]:
                return Unfinished({**state, "after": end, "done": done})
        return {"update_field": field, "new_value": value, "ships": done}
