"""The declaration of an order handler, and the built-in ones (docs/protocol.rst, "Orders").

To add a built-in handler, write a module and one entry in :data:`BUILTIN`. The message type, the HTTP operation and the
command ``s2s order`` follow from its declaration.
"""

from __future__ import annotations

from typing import Final

from s2s.handlers.orders.config_set import ConfigSet
from s2s.handlers.orders.force_tick import ForceTick
from s2s.handlers.orders.handler import (
    IOrderHandler,
    OrderHandler,
    OrderRun,
    command_name,
    message_type,
    registry,
)

BUILTIN: Final[tuple[OrderHandler, ...]] = (ForceTick(), ConfigSet())

__all__ = ["BUILTIN", "IOrderHandler", "OrderHandler", "OrderRun", "command_name", "message_type", "registry"]
