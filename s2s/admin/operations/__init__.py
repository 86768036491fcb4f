"""The operations of operators, each declared once (docs/api.rst).

To add an operation, declare it in the module of its topic, and add it to the ``OPERATIONS`` of that module. A new
module needs one line in :data:`OPERATIONS` here. The HTTP API and its OpenAPI document are derived from the
declarations; add the operation to the table of ``docs/api.rst``, and a method to the client (:mod:`s2s.admin.client`).
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
