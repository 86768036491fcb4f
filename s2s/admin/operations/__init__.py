"""What operators may do, each declared once (docs/api.rst).

To add an operation, declare it in the module that it fits, and put it into that module's ``OPERATIONS``; a new module
has one line in :data:`OPERATIONS` here. The HTTP API, its OpenAPI document and ``docs/api.rst`` follow from that; the
client has a method for each (:mod:`s2s.admin.client`).
"""

from __future__ import annotations

from typing import Any, Final

from s2s.admin.operations import catalogue, commands, config, engines, lists, notices, orders, outbox
from s2s.admin.operations.operation import Operation

OPERATIONS: Final[tuple[Operation[Any], ...]] = (
    *engines.OPERATIONS,
    *orders.OPERATIONS,
    *commands.OPERATIONS,
    *outbox.OPERATIONS,
    *notices.OPERATIONS,
    *config.OPERATIONS,
    *lists.OPERATIONS,
    *catalogue.OPERATIONS,
)
