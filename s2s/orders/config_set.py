"""``admin.config.set.v1``: give a setting a value."""

from __future__ import annotations

from typing import ClassVar

from s2s.errors import BadPayload, NotFound, OperatorError
from s2s.jobs import Outcome
from s2s.orders.kind import OrderRun, OrderType
from s2s.store import config
from s2s.store.driver import Cursor


class ConfigSet(OrderType):
    """Sets a value, which every process is told of at once."""

    rpc: ClassVar[str] = "admin.config.set.v1"

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Come to the version that is in force, and whether this order made it."""
        key, value = order.params["key"], order.params["value"]
        if not config.exists(txn, key):
            raise NotFound(f"there is no setting {key!r}: see s2s config list", path="/payload/key")
        try:
            version = config.change(txn, key, value, order.actor)
        except OperatorError as error:
            raise BadPayload(str(error), path="/payload/value") from None
        in_force = config.read(txn).version if version is None else version
        return {"key": key, "value": value, "version": in_force, "changed": version is not None}
