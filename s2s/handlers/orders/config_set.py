"""``admin.config.set.v1``: set the value of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from s2s.errors import BadPayload, NotFound, OperatorError
from s2s.handlers.orders.handler import OrderHandler, OrderRun
from s2s.handlers.run import Outcome
from s2s.protocol.canonical import MAX_INTEGER
from s2s.protocol.settings import Value
from s2s.store.access import Access
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.tables import config


class ConfigSet(OrderHandler):
    """Sets a value. Every process is notified of it at once."""

    rpc: ClassVar[str] = "admin.config.set.v1"
    command: ClassVar[str] = "config-set"
    access: ClassVar[Access] = "admin"
    schema: ClassVar[Mapping[str, Any]] = {
        "description": "Sets one key of the game configuration.",
        "type": "object",
        "properties": {
            "key": {"description": "Which setting.", "type": "string", "minLength": 1, "maxLength": 200},
            "value": {
                "description": "The new value, of the setting's own type.",
                "type": ["string", "integer", "boolean"],
                "minimum": -MAX_INTEGER,
                "maximum": MAX_INTEGER,
            },
        },
        "required": ["key", "value"],
        "additionalProperties": False,
    }

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Set the value, and return the version that is in force and whether this order made it."""
        return set_value(own(txn), order.params["key"], order.params["value"], order.actor)


def set_value(txn: Cursor, key: str, value: Value, actor: str, at: str = "/payload") -> dict[str, Any]:
    """Set the value of a setting.

    :param at: the path in the request to the object with key and value.
    :raises NotFound: there is no such setting.
    :raises BadPayload: the setting cannot have this value.
    """
    if not config.exists(txn, key):
        raise NotFound(f"there is no setting {key!r}: see s2s config list", path=f"{at}/key")
    try:
        version = config.change(txn, key, value, actor)
    except OperatorError as error:
        raise BadPayload(str(error), path=f"{at}/value") from None
    in_force = config.read(txn).version if version is None else version
    return {"key": key, "value": value, "version": in_force, "changed": version is not None}
